"""The automatic callbacks for the ``pytorch_lightning`` package, whose ``Callback`` is another class."""

from pytorch_lightning import Callback

from lightning_optim.control.replay.guard import ReplayGuard
from lightning_optim.control.schedules.totals import TotalsFiller


class FillTotalSteps(TotalsFiller, Callback):
    """As :class:`lightning_optim.callbacks.FillTotalSteps`, for ``pytorch_lightning.Trainer``."""


class RefuseWithoutReplay(ReplayGuard, Callback):
    """As :class:`lightning_optim.callbacks.RefuseWithoutReplay`, for ``pytorch_lightning.Trainer``."""
