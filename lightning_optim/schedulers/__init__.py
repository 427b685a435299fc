"""Learning-rate schedules: closed forms of the step, exact on resume, each a true torch ``LRScheduler``.

=================  ==========================================================
:class:`Linear`    linear warmup, linear decay
:class:`Cosine`    linear warmup, cosine decay
:class:`WSD`       linear warmup, plateau, short decay at the end
=================  ==========================================================

:class:`Schedule` is the base for further ones.
"""

from lightning_optim.schedulers.base import Schedule
from lightning_optim.schedulers.cosine import Cosine
from lightning_optim.schedulers.linear import Linear
from lightning_optim.schedulers.wsd import WSD

__all__ = ["WSD", "Cosine", "Linear", "Schedule"]
