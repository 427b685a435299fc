"""The strategies for ``pytorch_lightning.Trainer``, whose ``Strategy`` is another class.

See :mod:`lightning_optim.strategies.lightning`.
"""

from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy

from lightning_optim.strategies.auto import Auto
from lightning_optim.strategies.detached import DetachedOnOneDevice, DetachedReplicas, DetachedSharded
from lightning_optim.strategies.detached_deepspeed import DetachedDeepSpeed
from lightning_optim.strategies.in_graph import InGraphOnOneDevice, InGraphReplicas, InGraphSharded


class InGraphStrategy(InGraphOnOneDevice, SingleDeviceStrategy):
    """The same as :class:`lightning_optim.strategies.InGraphStrategy`, for ``pytorch_lightning``."""

    root = "pytorch_lightning"
    strategy_name = "in_graph"


class InGraphDDPStrategy(InGraphReplicas, DDPStrategy):
    """The same as :class:`lightning_optim.strategies.InGraphDDPStrategy`, for ``pytorch_lightning``."""

    root = "pytorch_lightning"
    strategy_name = "in_graph_ddp"


class InGraphFSDP2Strategy(InGraphSharded, ModelParallelStrategy):
    """The same as :class:`lightning_optim.strategies.InGraphFSDP2Strategy`, for ``pytorch_lightning``."""

    root = "pytorch_lightning"
    strategy_name = "in_graph_fsdp2"


class DetachedDeepSpeedStrategy(DetachedDeepSpeed, DeepSpeedStrategy):
    """The same as :class:`lightning_optim.strategies.DetachedDeepSpeedStrategy`, for ``pytorch_lightning``."""

    strategy_name = "detached_deepspeed"


class DetachedStrategy(DetachedOnOneDevice, SingleDeviceStrategy):
    """The same as :class:`lightning_optim.strategies.DetachedStrategy`, for ``pytorch_lightning``."""

    root = "pytorch_lightning"
    strategy_name = "detached"


class DetachedDDPStrategy(DetachedReplicas, DDPStrategy):
    """The same as :class:`lightning_optim.strategies.DetachedDDPStrategy`, for ``pytorch_lightning``."""

    root = "pytorch_lightning"
    strategy_name = "detached_ddp"


class DetachedFSDP2Strategy(DetachedSharded, ModelParallelStrategy):
    """The same as :class:`lightning_optim.strategies.DetachedFSDP2Strategy`, for ``pytorch_lightning``."""

    root = "pytorch_lightning"
    strategy_name = "detached_fsdp2"


class OptimAutoStrategy(Auto, SingleDeviceStrategy):
    """The same as :class:`lightning_optim.strategies.OptimAutoStrategy`, for ``pytorch_lightning``."""

    root = "pytorch_lightning"
    strategy_name = "optim_auto"
