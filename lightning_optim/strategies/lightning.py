"""The strategies for ``lightning.pytorch.Trainer``."""

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from lightning_optim.strategies.in_graph import InGraph, InGraphOnOneDevice, InGraphSharded


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

    Raises:
        ValueError: An unknown engine, more than one device, two limits for the same gradients, or
            ``step_in_backward`` with what needs all gradients at once.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(strategy=InGraphStrategy(engine="foreach"), accelerator="cpu", logger=False)
        >>> trainer.strategy.root_device
        device(type='cpu')
    """

    root = "lightning.pytorch"
    strategy_name = "in_graph"


class InGraphDDPStrategy(InGraph, DDPStrategy):
    """``strategy="in_graph_ddp"``: :class:`InGraphStrategy` on every device of ``DDPStrategy``.

    Args:
        engine: As of :class:`InGraphStrategy`.
        capture: As of :class:`InGraphStrategy`.
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
        **kwargs: As of ``ModelParallelStrategy``.
    """

    root = "lightning.pytorch"
    strategy_name = "in_graph_fsdp2"
