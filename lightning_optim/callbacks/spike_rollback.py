"""Undoes steps after which the loss spikes, under any strategy and with any optimizer."""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar, Unpack

from lightning_optim.callbacks.roots import Callback
from lightning_optim.control.rollback.judged_steps import JudgedSteps
from lightning_optim.control.rollback.policy import UndoJudge, UndoOptions, UndoPolicy
from lightning_optim.warnings import warn_once


class SpikeRollback(Callback):
    """Judge the loss of every step before the step is made, and undo the step before it if the loss spikes.

    Weights, the optimizer's state and buffers become what they were, the batch with the high loss is left out, the
    learning rate is halved (see ``factor``), and the run goes on. The option ``undo=`` of our strategies adds this
    callback. In automatic optimization with one optimizer; other trainings are refused when the fit starts.

    Logged: ``undo/count``, the steps that were undone, and ``undo/lr_scale``, what the learning rate was multiplied by
    in all. Records, limits and the detector's state are in checkpoints.

    Args:
        **options: See :class:`~lightning_optim.control.rollback.policy.UndoOptions`.

    Attributes:
        policy: What a spike is, and what is done about it.
        judge: Decides about each loss.

    Raises:
        TypeError: An option is unknown, or has the wrong type.
        ValueError: An option is out of its range; or, when the fit starts, steps of the training cannot be undone.

    Example:
        >>> from lightning_optim.callbacks import SpikeRollback
        >>> SpikeRollback(threshold=6.0, max_undos=3).policy.max_undos
        3
    """

    root: ClassVar[str]
    #: Whether a strategy's option ``undo=`` has added it, rather than the user.
    of_strategy = False

    def __init__(self, **options: Unpack[UndoOptions]) -> None:
        policy = UndoPolicy.of(options, "SpikeRollback")
        assert policy is not None  # noqa: S101 # it is for False
        self.policy = policy
        self.judge = UndoJudge(policy)
        self._steps: JudgedSteps | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies, which belong to no training: Lightning lends callbacks the module's ``log``."""
        lent = ("log", "log_dict")
        return {**{name: value for name, value in self.__dict__.items() if name not in lent}, "_steps": None}

    @property
    def records(self) -> list[dict[str, Any]]:
        """What was decided about each spike: dicts of primitives, fit for lines of JSON."""
        return [dict(record) for record in self.judge.records]

    # -- what Lightning calls -----------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The name in checkpoints, the same for both roots of Lightning."""
        return "lightning_optim.Undo"

    def state_dict(self) -> dict[str, Any]:
        """The judge's state."""
        return self.judge.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the judge's state."""
        self.judge.load_state_dict(state_dict)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to judge steps."""
        self._remove()
        self._steps = JudgedSteps(trainer, self)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log how many steps were undone, and what the learning rate was multiplied by in all."""
        if not trainer.barebones:
            pl_module.log("undo/count", float(self.judge.count))
            pl_module.log("undo/lr_scale", self.judge.lr_scale)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the strategy as it was found."""
        self._remove()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the strategy as it was found."""
        self._remove()

    # -- what judged steps ask ----------------------------------------------------------------------------------

    @property
    def asked_for(self) -> str:
        """What the user asked for."""
        return "undo" if self.of_strategy else "SpikeRollback"

    @property
    def without(self) -> str:
        """How to do without it."""
        return "undo=False" if self.of_strategy else "a Trainer without it"

    def is_on(self, trainer: Any) -> bool:
        """Whether the callback is the Trainer's at the moment."""
        return any(callback is self for callback in trainer.callbacks)

    def say(self, trainer: Any, message: str) -> None:
        """Write a line into Lightning's log, on the first rank."""
        import_module(f"{self.root}.utilities.rank_zero").rank_zero_info(f"{self._speaker(trainer)}: {message}")

    def warn(self, trainer: Any, message: str) -> None:
        """Warn once, on the first rank."""
        if trainer.is_global_zero:
            warn_once(f"{self._speaker(trainer)}: {message}")

    def _speaker(self, trainer: Any) -> str:
        return trainer.strategy.strategy_name if self.of_strategy else "SpikeRollback"

    def _remove(self) -> None:
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.remove()
