"""Stops trainings in which SAM or L-BFGS would silently be something else; a fit that has them gets it by itself."""

from lightning_optim.callbacks.roots import Callback
from lightning_optim.control.replay.guard import ReplayGuard


class RefuseWithoutReplay(ReplayGuard, Callback):
    """Refuse SAM and L-BFGS of ours where only a strategy of ours does them right.

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
