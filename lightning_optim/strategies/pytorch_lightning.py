"""The strategies for ``pytorch_lightning.Trainer``, whose ``Strategy`` is another class.

See :mod:`lightning_optim.strategies.lightning`.
"""

from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy

from lightning_optim.strategies.auto import Auto
from lightning_optim.strategies.detached import DetachedOnOneDevice, DetachedReplicas, DetachedSharded
from lightning_optim.strategies.detached_deepspeed import DetachedDeepSpeed
from lightning_optim.strategies.in_graph import InGraphOnOneDevice, InGraphReplicas, InGraphSharded


class InGraphStrategy(InGraphOnOneDevice, SingleDeviceStrategy):
    """As :class:`lightning_optim.strategies.InGraphStrategy`."""

    root = "pytorch_lightning"
    strategy_name = "in_graph"


class InGraphDDPStrategy(InGraphReplicas, DDPStrategy):
    """As :class:`lightning_optim.strategies.InGraphDDPStrategy`."""

    root = "pytorch_lightning"
    strategy_name = "in_graph_ddp"


class InGraphFSDP2Strategy(InGraphSharded, ModelParallelStrategy):
    """As :class:`lightning_optim.strategies.InGraphFSDP2Strategy`."""

    root = "pytorch_lightning"
    strategy_name = "in_graph_fsdp2"


class DetachedDeepSpeedStrategy(DetachedDeepSpeed, DeepSpeedStrategy):
    """As :class:`lightning_optim.strategies.DetachedDeepSpeedStrategy`."""

    strategy_name = "detached_deepspeed"


class DetachedStrategy(DetachedOnOneDevice, SingleDeviceStrategy):
    """As :class:`lightning_optim.strategies.DetachedStrategy`."""

    root = "pytorch_lightning"
    strategy_name = "detached"


class DetachedDDPStrategy(DetachedReplicas, DDPStrategy):
    """As :class:`lightning_optim.strategies.DetachedDDPStrategy`."""

    root = "pytorch_lightning"
    strategy_name = "detached_ddp"


class DetachedFSDP2Strategy(DetachedSharded, ModelParallelStrategy):
    """As :class:`lightning_optim.strategies.DetachedFSDP2Strategy`."""

    root = "pytorch_lightning"
    strategy_name = "detached_fsdp2"


class OptimAutoStrategy(Auto, SingleDeviceStrategy):
    """As :class:`lightning_optim.strategies.OptimAutoStrategy`."""

    root = "pytorch_lightning"
    strategy_name = "optim_auto"
