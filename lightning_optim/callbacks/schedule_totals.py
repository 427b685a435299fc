"""Fills ``total_steps`` of our schedules under Lightning; a fit with one that lacks it gets this automatically."""

from lightning_optim.callbacks.roots import Callback
from lightning_optim.control.schedules.totals import TotalsFiller


class FillTotalSteps(TotalsFiller, Callback):
    """Tell schedules that were built without ``total_steps`` how long the run is.

    It does so when training starts: the data is set up then, a checkpoint is restored, and no step has been
    made. A total filled by an earlier run is replaced, so that resuming with a larger ``max_steps`` stretches
    the schedule; one that joins a run under way gets the steps that remain. A Trainer gets this callback,
    before its others, when a fit with such a schedule starts (see :mod:`lightning_optim.callbacks.joining`);
    adding it by hand does no harm.

    Raises:
        ValueError: (when training starts) The run has no end that can be known; the message names the limits.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_optim.callbacks import FillTotalSteps
        >>> trainer = Trainer(callbacks=[FillTotalSteps()], logger=False, enable_checkpointing=False)
        >>> sum(isinstance(callback, FillTotalSteps) for callback in trainer.callbacks)
        1
    """
