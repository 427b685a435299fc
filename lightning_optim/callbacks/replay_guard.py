"""Stops trainings in which SAM or L-BFGS would silently go wrong; a fit with these gets this callback automatically."""

from lightning_optim.callbacks.roots import Callback
from lightning_optim.control.replay.guard import ReplayGuard


class RefuseWithoutReplay(ReplayGuard, Callback):
    """Refuse our SAM and L-BFGS in trainings in which only our strategies do them right.

    A Trainer gets this callback when a fit with one of them starts under another strategy (see
    :mod:`lightning_optim.callbacks.joining`).

    Raises:
        ValueError: (when training starts) The strategy is Lightning's own, and the Trainer accumulates, scales the
            loss, or clips; the message names the strategies that can.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_optim.callbacks import RefuseWithoutReplay
        >>> trainer = Trainer(callbacks=[RefuseWithoutReplay()], logger=False, enable_checkpointing=False)
        >>> sum(isinstance(callback, RefuseWithoutReplay) for callback in trainer.callbacks)
        1
    """
