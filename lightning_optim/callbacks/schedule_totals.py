"""Fills ``total_steps`` of our schedules under Lightning; every Trainer gets it by an entry point."""

from lightning.pytorch import Callback

from lightning_optim.control.schedule_totals import TotalsFiller


class FillTotalSteps(TotalsFiller, Callback):
    """Tell schedules that were built without ``total_steps`` how long the run is.

    It does so when training starts: the data is set up then, a checkpoint is restored, and no step has been
    made. A total filled by an earlier run is replaced, so that resuming with a larger ``max_steps`` stretches
    the schedule. Installing the package adds this callback to every Trainer (see
    :mod:`lightning_optim.callbacks.factories`); adding it once more does no harm.

    Raises:
        ValueError: (when training starts) The run has no end that can be known; the message names the limits.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_steps=100, logger=False, enable_checkpointing=False)
        >>> any(isinstance(callback, FillTotalSteps) for callback in trainer.callbacks)
        True
    """
