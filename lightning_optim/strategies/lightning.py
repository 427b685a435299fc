"""The strategies for ``lightning.pytorch.Trainer``."""

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy

from lightning_optim.strategies.auto import Auto
from lightning_optim.strategies.detached import DetachedOnOneDevice, DetachedReplicas, DetachedSharded
from lightning_optim.strategies.detached_deepspeed import DetachedDeepSpeed
from lightning_optim.strategies.in_graph import InGraphOnOneDevice, InGraphReplicas, InGraphSharded


class InGraphStrategy(InGraphOnOneDevice, SingleDeviceStrategy):
    """``strategy="in_graph"``: the optimizer's step on one device, clipping and unscaling included.

    Optimizers of ours, and instances of ``torch.optim.SGD``, ``Adam`` and ``AdamW``, are stepped by our engines, the
    Triton engine on CUDA. Clipping by the Trainer's ``gradient_clip_val`` and the unscaling of ``16-mixed`` happen in
    the step, with no pass over the gradients of their own. Any other optimizer runs its own step, as everywhere else.
    Checkpoints are those of Lightning's own strategies.

    Args:
        device: The device; by default the one that the Trainer is given.
        accelerator: As of ``SingleDeviceStrategy``.
        checkpoint_io: As of ``SingleDeviceStrategy``.
        precision_plugin: As of ``SingleDeviceStrategy``.
        engine: The engine of torch's optimizers and, if it is not ``"auto"``, of ours as well.
        capture: Record the steps as CUDA graphs, which one call replays; every parameter must have a gradient.
        step_in_backward: Step each parameter, and free its gradient, while the backward pass still runs. With
            ``gradient_clip_val`` it says how to clip, since the global norm is not known then: ``"per_tensor"`` or
            ``"previous_norm"``: see :class:`~lightning_optim.control.step_in_backward.StepInBackward`.
        undo: Undo steps after which the loss spikes, and halve the learning rate: True, or options of
            :class:`~lightning_optim.control.rollback.policy.UndoPolicy` as a dict.

    Raises:
        ValueError: An unknown engine, more than one device, two limits for the same gradients, ``step_in_backward``
            with what needs all gradients at once, or ``undo`` with what it cannot serve.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy=InGraphStrategy(engine="foreach"), accelerator="cpu", logger=False)
        >>> trainer.strategy.root_device
        device(type='cpu')
    """

    root = "lightning.pytorch"
    strategy_name = "in_graph"


class InGraphDDPStrategy(InGraphReplicas, DDPStrategy):
    """``strategy="in_graph_ddp"``: :class:`InGraphStrategy` on every device of ``DDPStrategy``.

    Args:
        engine: As of :class:`InGraphStrategy`.
        capture: As of :class:`InGraphStrategy`.
        undo: As of :class:`InGraphStrategy`.
        **kwargs: As of ``DDPStrategy``.
    """

    root = "lightning.pytorch"
    strategy_name = "in_graph_ddp"


class InGraphFSDP2Strategy(InGraphSharded, ModelParallelStrategy):
    """``strategy="in_graph_fsdp2"``: :class:`InGraphStrategy` over what ``fully_shard`` has divided.

    Each process steps its own shards; the norm to clip by is of the whole gradient and costs one sum of one number.
    As for ``ModelParallelStrategy``, the module's ``configure_model`` calls ``fully_shard``.

    Args:
        data_parallel_size: Processes over which parameters are divided; ``"auto"``: all there are, divided by
            ``tensor_parallel_size`` (for ``ModelParallelStrategy`` it means one for each machine).
        tensor_parallel_size: Processes that share in each layer.
        engine: As of :class:`InGraphStrategy`.
        capture: As of :class:`InGraphStrategy`.
        undo: As of :class:`InGraphStrategy`.
        **kwargs: As of ``ModelParallelStrategy``.
    """

    root = "lightning.pytorch"
    strategy_name = "in_graph_fsdp2"


class DetachedDeepSpeedStrategy(DetachedDeepSpeed, DeepSpeedStrategy):
    """``strategy="detached_deepspeed"``: ZeRO 1 to 3, by default with masters, state and the step in host memory.

    Lightning's ``DeepSpeedStrategy``, but that the optimizer of ``configure_optimizers`` is what DeepSpeed steps, also
    with offload, and that what DeepSpeed would silently do otherwise is an error when the fit starts: see
    :func:`~lightning_optim.control.deepspeed.deepspeed_config`. Checkpoints are DeepSpeed's directories.

    Args:
        offload_optimizer: Keep masters and state in host memory, and step there. A ``config`` says so itself.
        **kwargs: As of ``DeepSpeedStrategy``, of which ``stage`` is one, and ``config``, a dict or a file, which takes
            the place of the others.

    Raises:
        ModuleNotFoundError: DeepSpeed is not installed.
        ValueError: The configuration, or the optimizer, asks for what cannot be done; the message says what can.
    """

    strategy_name = "detached_deepspeed"


class DetachedStrategy(DetachedOnOneDevice, SingleDeviceStrategy):
    """``strategy="detached"``: masters and state in host memory, where a compiled kernel updates them.

    Gradients leave the device as soon as they are complete, bucket by bucket, while the backward pass goes on; weights
    come back in their own type. Clipping, loss scaling, accumulation, schedules and checkpoints are as everywhere
    else, and checkpoints go from and to any other strategy. Any optimizer may be used: ours, and torch's ``SGD``,
    ``Adam`` and ``AdamW``, are stepped by our engines; others run their own step on the masters.

    Args:
        device: The device; by default the one that the Trainer is given.
        accelerator: As of ``SingleDeviceStrategy``.
        checkpoint_io: As of ``SingleDeviceStrategy``.
        precision_plugin: As of ``SingleDeviceStrategy``.
        master_dtype: Of the masters: ``"float32"`` or ``"float64"``.
        clip: ``"exact"``, ``"speculative"`` or ``"none"``: see :class:`~lightning_optim.offload.DetachedOptions`.
        bucket_mb: Megabytes of gradients that travel together.
        device_fraction: The share of the weights whose masters and state stay on the device.
        delay_one_step: Update beside the next forward and backward pass: an approximation.
        wait: ``"step"`` or ``"forward"``: see :class:`~lightning_optim.offload.DetachedOptions`. Where hooks of the
            module, or of other callbacks than Lightning's own, come between a step and the next batch (or the end of
            the epoch, or a validation), it is ``"step"``.
        engine: Of our optimizers, and of those of torch's that we step.
        undo: As of :class:`InGraphStrategy`.

    Raises:
        ValueError: An option that is none, or that the optimizer or the Trainer cannot serve.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy=DetachedStrategy(clip="speculative"), accelerator="cpu", logger=False)
        >>> trainer.strategy.options.clip
        'speculative'
    """

    root = "lightning.pytorch"
    strategy_name = "detached"


class DetachedDDPStrategy(DetachedReplicas, DDPStrategy):
    """``strategy="detached_ddp"``: :class:`DetachedStrategy` on every device of ``DDPStrategy``.

    Masters and state are divided over the processes, parameter by parameter; each fetches the (averaged) gradients of
    its own, after the backward pass, and gives the others the new weights.

    Args:
        master_dtype: As of :class:`DetachedStrategy`.
        bucket_mb: As of :class:`DetachedStrategy`.
        device_fraction: As of :class:`DetachedStrategy`.
        engine: As of :class:`DetachedStrategy`.
        undo: As of :class:`InGraphStrategy`.
        **kwargs: As of ``DDPStrategy``.
    """

    root = "lightning.pytorch"
    strategy_name = "detached_ddp"


class DetachedFSDP2Strategy(DetachedSharded, ModelParallelStrategy):
    """``strategy="detached_fsdp2"``: :class:`DetachedStrategy` over what ``fully_shard`` has divided.

    Each process has the masters and the state of its own shards in its own memory.

    Args:
        data_parallel_size: As of :class:`InGraphFSDP2Strategy`.
        tensor_parallel_size: As of :class:`InGraphFSDP2Strategy`.
        master_dtype: As of :class:`DetachedStrategy`.
        bucket_mb: As of :class:`DetachedStrategy`.
        device_fraction: As of :class:`DetachedStrategy`.
        engine: As of :class:`DetachedStrategy`.
        undo: As of :class:`InGraphStrategy`.
        **kwargs: As of ``ModelParallelStrategy``.
    """

    root = "lightning.pytorch"
    strategy_name = "detached_fsdp2"


class OptimAutoStrategy(Auto, SingleDeviceStrategy):
    """``strategy="optim_auto"``: ``in_graph`` or ``detached``, whichever the measured machine has room for.

    When a fit starts, free memory and the speed of the link are measured, and the bytes of weights, gradients, state
    and masters counted: see :func:`~lightning_optim.placement.choice.choose`, and ``lightning-optim plan``, which says
    the same beforehand. The reason is logged, and part of :meth:`report`. If the device runs out of memory in a run
    that began in_graph, masters and state move to the host, what was being done is done again with the same noise, and
    the run goes on, its results as if nothing had happened; with bfloat16 or float16 weights it goes on with float32
    masters, which it had not. (Batches of a window are kept until the step for that; not
    recovered is the middle of a step whose weights have begun to change, and manual optimization.)

    Args:
        device: The device; by default the one that the Trainer is given.
        accelerator: As of ``SingleDeviceStrategy``.
        checkpoint_io: As of ``SingleDeviceStrategy``.
        precision_plugin: As of ``SingleDeviceStrategy``.
        activation_gb: Gigabytes (1e9 bytes) of device memory that activations need; None: a reserve is kept.
        master_dtype: As of :class:`DetachedStrategy`.
        clip: As of :class:`DetachedStrategy`; ``"auto"``: what the plan says.
        bucket_mb: As of :class:`DetachedStrategy`.
        engine: As of :class:`InGraphStrategy`.
        undo: As of :class:`InGraphStrategy`.

    Raises:
        ValueError: An option that is none.
        PlacementError: (When a fit starts) Nothing fits; the message has the arithmetic, and what would fit.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy=OptimAutoStrategy(activation_gb=2), accelerator="cpu", logger=False)
        >>> trainer.strategy.report()
        'optim_auto: no training has begun'
    """

    root = "lightning.pytorch"
    strategy_name = "optim_auto"
