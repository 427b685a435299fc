"""Stops trainings in which SAM or L-BFGS would silently be something else; every Trainer gets it by an entry point."""

from lightning.pytorch import Callback

from lightning_optim.control.replay_guard import ReplayGuard


class RefuseWithoutReplay(ReplayGuard, Callback):
    """Refuse SAM and L-BFGS of ours where only a strategy of ours does them right.

    Raises:
        ValueError: (when training starts) The strategy is Lightning's own, and the Trainer accumulates, scales the
            loss, or clips; the message names the strategies that can.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_steps=100, logger=False, enable_checkpointing=False)
        >>> any(isinstance(callback, RefuseWithoutReplay) for callback in trainer.callbacks)
        True
    """
