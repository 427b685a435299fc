"""The option ``undo=`` of our strategies, which adds :class:`~lightning_optim.callbacks.SpikeRollback`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from lightning_optim.callbacks.roots import callback_class
from lightning_optim.control.rollback.policy import UndoPolicy

#: Stands for the base class that comes after this one: a strategy of Lightning's, of either root.
_Strategy: Any = object


class Undoes(_Strategy):
    """Judges the loss of every step before it is made, and undoes the one before it if it spikes.

    Args:
        *args: Arguments of the Lightning strategy.
        undo: Whether to undo steps, and how: see :class:`~lightning_optim.control.rollback.policy.UndoPolicy`.
        **kwargs: Arguments of the Lightning strategy.

    Raises:
        TypeError: ``undo`` is something else, or has an unknown option.
        ValueError: An option is out of its range, or the Trainer has a ``SpikeRollback`` as well.
    """

    root: ClassVar[str]

    def __init__(self, *args: Any, undo: bool | dict[str, Any] | UndoPolicy = False, **kwargs: Any) -> None:
        policy = UndoPolicy.of(undo)
        super().__init__(*args, **kwargs)
        self.undo = policy

    def setup_environment(self) -> None:
        """Give the Trainer the callback, which also saves in checkpoints what a resumed run has to know."""
        super().setup_environment()
        trainer = self._trainer
        if self.undo is None or trainer.state.fn != "fit":
            return
        present = self._rollback
        if present is not None and not present.of_strategy:
            raise ValueError("SpikeRollback with undo= of the strategy, which adds another one; valid: one of them")
        if present is None:
            callback = callback_class("SpikeRollback", self.root)(**asdict(self.undo))
            callback.of_strategy = True
            # At the front, so that others see what it logs. A new list, as Lightning may be iterating over the old one.
            trainer.callbacks = [callback, *trainer.callbacks]

    @property
    def undo_records(self) -> list[dict[str, Any]]:
        """What was decided about each spike: dicts of primitives, fit for lines of JSON."""
        return [] if self._rollback is None else self._rollback.records

    @property
    def _rollback(self) -> Any:
        """The callback, if it is the Trainer's: tuners remove callbacks for their trials."""
        callbacks = () if self.lightning_module is None else self._trainer.callbacks
        return next((callback for callback in callbacks if type(callback).__name__ == "SpikeRollback"), None)
