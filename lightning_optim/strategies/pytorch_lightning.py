"""The strategies for ``pytorch_lightning.Trainer``, whose ``Strategy`` is another class.

See :mod:`lightning_optim.strategies.lightning`.
"""

from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from lightning_optim.strategies.in_graph import InGraph, InGraphOnOneDevice, InGraphSharded


class InGraphStrategy(InGraphOnOneDevice, SingleDeviceStrategy):
    """As :class:`lightning_optim.strategies.InGraphStrategy`."""

    root = "pytorch_lightning"
    strategy_name = "in_graph"


class InGraphDDPStrategy(InGraph, DDPStrategy):
    """As :class:`lightning_optim.strategies.InGraphDDPStrategy`."""

    root = "pytorch_lightning"
    strategy_name = "in_graph_ddp"


class InGraphFSDP2Strategy(InGraphSharded, ModelParallelStrategy):
    """As :class:`lightning_optim.strategies.InGraphFSDP2Strategy`."""

    root = "pytorch_lightning"
    strategy_name = "in_graph_fsdp2"
