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
    the step, without a further pass over the gradients. Any other optimizer runs its own step, as everywhere else.
    Checkpoints are those of Lightning's own strategies.

    Args:
        device: The device; by default the one that the Trainer is given.
        accelerator: See ``SingleDeviceStrategy``.
        checkpoint_io: See ``SingleDeviceStrategy``.
        precision_plugin: See ``SingleDeviceStrategy``.
        engine: The engine of torch's optimizers and, if it is not ``"auto"``, of ours as well.
        capture: Record the steps as CUDA graphs, which one call replays; every parameter must have a gradient.
        step_in_backward: Step each parameter, and free its gradient, while the backward pass still runs. With
            ``gradient_clip_val`` it also says how to clip, since the global norm is not known then: ``"per_tensor"`` or
            ``"previous_norm"``, see :class:`~lightning_optim.control.step_in_backward.StepInBackward`.
        undo: Undo steps after which the loss spikes, and halve the learning rate: True, or options of
            :class:`~lightning_optim.control.rollback.policy.UndoPolicy` as a dict.

    Raises:
        ValueError: The engine is unknown, there is more than one device, there are two limits for the same gradients,
            or the training does not go with ``step_in_backward`` or ``undo``.

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
        engine: See :class:`InGraphStrategy`.
        capture: See :class:`InGraphStrategy`.
        undo: See :class:`InGraphStrategy`.
        **kwargs: See ``DDPStrategy``.
    """

    root = "lightning.pytorch"
    strategy_name = "in_graph_ddp"


class InGraphFSDP2Strategy(InGraphSharded, ModelParallelStrategy):
    """``strategy="in_graph_fsdp2"``: :class:`InGraphStrategy` over what ``fully_shard`` has divided.

    Each process steps its own shards; the norm to clip by is of the whole gradient, and costs one all-reduce of one
    number. As for ``ModelParallelStrategy``, the module's ``configure_model`` calls ``fully_shard``.

    Args:
        data_parallel_size: Processes over which parameters are divided; ``"auto"``: all there are, divided by
            ``tensor_parallel_size`` (for ``ModelParallelStrategy`` it means one for each machine).
        tensor_parallel_size: Processes that share in each layer.
        engine: See :class:`InGraphStrategy`.
        capture: See :class:`InGraphStrategy`.
        undo: See :class:`InGraphStrategy`.
        **kwargs: See ``ModelParallelStrategy``.
    """

    root = "lightning.pytorch"
    strategy_name = "in_graph_fsdp2"


class DetachedDeepSpeedStrategy(DetachedDeepSpeed, DeepSpeedStrategy):
    """``strategy="detached_deepspeed"``: ZeRO 1 to 3, by default with masters, state and the step in host memory.

    Unlike with Lightning's ``DeepSpeedStrategy``, DeepSpeed steps the optimizer of ``configure_optimizers`` also with
    offload; and where DeepSpeed would silently do something else, the fit fails when it starts: see
    :func:`~lightning_optim.control.deepspeed.deepspeed_config`. Checkpoints are DeepSpeed's directories.

    Args:
        offload_optimizer: Keep masters and state in host memory, and step there. If ``config`` is given, it decides.
        **kwargs: See ``DeepSpeedStrategy``, such as ``stage``; or ``config``, a dict or a file, which replaces the
            other arguments.

    Raises:
        ModuleNotFoundError: DeepSpeed is not installed.
        ValueError: The configuration or the optimizer cannot be used; the message says what can.
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
        accelerator: See ``SingleDeviceStrategy``.
        checkpoint_io: See ``SingleDeviceStrategy``.
        precision_plugin: See ``SingleDeviceStrategy``.
        master_dtype: The type of the masters: ``"float32"`` or ``"float64"``.
        clip: ``"exact"``, ``"speculative"`` or ``"none"``: see :class:`~lightning_optim.offload.DetachedOptions`.
        bucket_mb: Megabytes of gradients that travel together.
        device_fraction: The share of the weights whose masters and state stay on the device.
        delay_one_step: Update beside the next forward and backward pass: an approximation.
        wait: ``"step"`` or ``"forward"``: see :class:`~lightning_optim.offload.DetachedOptions`. It acts as ``"step"``
            if hooks of the module, or of callbacks other than Lightning's own, come between a step and the next batch
            (or the end of the epoch, or a validation).
        engine: The engine of our optimizers, and of those of torch's that we step.
        undo: See :class:`InGraphStrategy`.

    Raises:
        ValueError: An option is not valid, or does not go with the optimizer or the Trainer.

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

    Masters and state are divided over the processes, parameter by parameter. After the backward pass, each process
    fetches the (averaged) gradients of its own parameters, and later sends their new weights to the others.

    Args:
        master_dtype: See :class:`DetachedStrategy`.
        bucket_mb: See :class:`DetachedStrategy`.
        device_fraction: See :class:`DetachedStrategy`.
        engine: See :class:`DetachedStrategy`.
        undo: See :class:`InGraphStrategy`.
        **kwargs: See ``DDPStrategy``.
    """

    root = "lightning.pytorch"
    strategy_name = "detached_ddp"


class DetachedFSDP2Strategy(DetachedSharded, ModelParallelStrategy):
    """``strategy="detached_fsdp2"``: :class:`DetachedStrategy` over what ``fully_shard`` has divided.

    Each process has the masters and the state of its own shards in its own memory.

    Args:
        data_parallel_size: See :class:`InGraphFSDP2Strategy`.
        tensor_parallel_size: See :class:`InGraphFSDP2Strategy`.
        master_dtype: See :class:`DetachedStrategy`.
        bucket_mb: See :class:`DetachedStrategy`.
        device_fraction: See :class:`DetachedStrategy`.
        engine: See :class:`DetachedStrategy`.
        undo: See :class:`InGraphStrategy`.
        **kwargs: See ``ModelParallelStrategy``.
    """

    root = "lightning.pytorch"
    strategy_name = "detached_fsdp2"


class OptimAutoStrategy(Auto, SingleDeviceStrategy):
    """``strategy="optim_auto"``: ``in_graph`` or ``detached``, whichever the measured machine has room for.

    When a fit starts, free memory and the speed of the link are measured, and the bytes of weights, gradients, state
    and masters counted: see :func:`~lightning_optim.placement.choice.choose`, and ``lightning-optim plan``, which says
    the same beforehand. The reason is logged, and part of :meth:`report`.

    If the device runs out of memory in a run that began in graph, masters and state move to the host, the work that
    failed is repeated with the same noise, and the run goes on with the results that it would have had. (With bfloat16
    or float16 weights, however, it goes on with float32 masters, which it did not have before.) For this, the batches
    of a window are kept until the step. A run cannot recover in the middle of a step whose weights have begun to
    change, or in manual optimization.

    Args:
        device: The device; by default the one that the Trainer is given.
        accelerator: See ``SingleDeviceStrategy``.
        checkpoint_io: See ``SingleDeviceStrategy``.
        precision_plugin: See ``SingleDeviceStrategy``.
        activation_gb: Gigabytes (1e9 bytes) of device memory that activations need; None: a reserve is kept.
        master_dtype: See :class:`DetachedStrategy`.
        clip: See :class:`DetachedStrategy`; ``"auto"``: what the plan says.
        bucket_mb: See :class:`DetachedStrategy`.
        engine: See :class:`InGraphStrategy`.
        undo: See :class:`InGraphStrategy`.

    Raises:
        ValueError: An option is not valid.
        PlacementError: (When a fit starts) Nothing fits; the message gives the arithmetic and says what would fit.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy=OptimAutoStrategy(activation_gb=2), accelerator="cpu", logger=False)
        >>> trainer.strategy.report()
        'optim_auto: no training has begun'
    """

    root = "lightning.pytorch"
    strategy_name = "optim_auto"
