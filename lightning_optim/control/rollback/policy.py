"""The decision what is done about a loss spike, and how often, from the losses alone.

Ranks that are given the same losses decide alike, and a run that is resumed goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypedDict

from lightning_optim.checks import Range, above, whole
from lightning_optim.control.rollback.snapshots import WHERE, Where
from lightning_optim.control.rollback.spikes import Scale, SpikeDetector, SpikePolicy

#: What happens at a loss spike when no more may be undone.
AfterCap = Literal["continue", "stop", "raise"]
AFTER_CAP = ("continue", "stop", "raise")

#: What is done with the step at hand. ``step``: it is made. ``hold``: it is made, and the snapshot is kept for a later
#: verdict. ``undo``: it is left out, and the steps since the snapshot are undone. ``stop``: the same, and the run ends.
#: ``raise``: the same, and an error is raised.
Action = Literal["step", "hold", "undo", "stop", "raise"]


class LossSpikeError(RuntimeError):
    """The loss spiked once more than may be undone, and ``after_cap="raise"``."""


@dataclass(frozen=True)
class UndoPolicy(SpikePolicy):
    """What a spike is, and what is done about it.

    Args:
        threshold: See :class:`~lightning_optim.control.rollback.spikes.SpikePolicy`, also for ``window``,
            ``warmup_steps``, ``min_ratio``, ``patience`` and ``scale``.
        factor: What the learning rate is multiplied by when a step is undone.
        recover_steps: Steps in which the learning rate returns from one undo, by equal ratios; None: it stays.
        max_undos: How many spikes are undone in all. PaLM had 20 in its whole training.
        max_consecutive: How many spikes in a row, with no fine loss between them, are undone. If no step was made
            between two of them, the second only leaves its batch out, and the learning rate is not multiplied.
        after_cap: What is done at a spike beyond these. ``"continue"``: the step is made; after ``max_consecutive`` the
            detector starts anew at this level, after ``max_undos`` nothing is judged any more. ``"stop"``: the last
            fine state is put back, and the run ends. ``"raise"``: the same, and
            :class:`LossSpikeError` is raised.
        snapshots: Where the copies of CUDA tensors are: ``"device"`` or ``"host"`` (in pinned memory).

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of its range.

    Example:
        >>> UndoPolicy(max_undos=3).factor
        0.5
        >>> UndoPolicy(after_cap="pray")
        Traceback (most recent call last):
        ValueError: UndoPolicy: after_cap='pray'; valid: continue, stop, raise
    """

    factor: float = 0.5
    recover_steps: int | None = None
    max_undos: int = 20
    max_consecutive: int = 3
    after_cap: AfterCap = "continue"
    snapshots: Where = "device"

    ranges: ClassVar[Mapping[str, Range]] = {
        **SpikePolicy.ranges,
        "factor": above(0, 1),
        "recover_steps": whole(1).or_none(),
        "max_undos": whole(1),
        "max_consecutive": whole(1),
    }
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **SpikePolicy.choices,
        "after_cap": AFTER_CAP,
        "snapshots": WHERE,
    }

    @classmethod
    def of(cls, option: bool | Mapping[str, Any] | UndoPolicy, name: str = "undo") -> UndoPolicy | None:
        """The policy that an option ``undo=`` asks for; None for False.

        Args:
            option: False, True (the defaults), some of the arguments by name, or a policy.
            name: What has the option, for messages.

        Raises:
            TypeError: ``option`` is something else, or has an unknown argument.
            ValueError: A value is out of its range.

        Example:
            >>> UndoPolicy.of({"threshold": 6.0}) == UndoPolicy(threshold=6.0)
            True
        """
        if isinstance(option, bool):
            return cls() if option else None
        if isinstance(option, UndoPolicy):
            return option
        names = [field.name for field in fields(cls)]
        if not isinstance(option, Mapping):
            raise TypeError(f"{name}={option!r}; valid: False, True, an UndoPolicy, or a dict of {', '.join(names)}")
        unknown = [name for name in option if name not in names]
        if unknown:
            raise TypeError(f"{name} has no option {unknown[0]!r}; valid: {', '.join(names)}")
        return cls(**option)


class UndoOptions(TypedDict, total=False):
    """The arguments of an :class:`UndoPolicy` as options of something else, with the same defaults.

    Args:
        threshold: Standard deviations above the running mean at which a loss is a spike (7).
        window: How many losses mean and deviation are averaged over, exponentially (100).
        warmup_steps: How many losses come before one can be a spike by its size (None: ``window``).
        min_ratio: Multiple of the running mean that a spike must exceed (1.1).
        patience: How many high losses in a row make a spike (1).
        scale: ``"log"`` or ``"linear"``: what is compared, logarithms or the losses themselves (log).
        factor: What the learning rate is multiplied by when a step is undone (0.5).
        recover_steps: Steps in which the learning rate returns from one undo (None: it stays).
        max_undos: How many spikes are undone in all (20).
        max_consecutive: How many spikes in a row are undone (3).
        after_cap: What is done at a spike beyond these: ``"continue"``, ``"stop"`` or ``"raise"`` (continue).
        snapshots: Where the copies of CUDA tensors are: ``"device"`` or ``"host"`` (device).
    """

    threshold: float
    window: int
    warmup_steps: int | None
    min_ratio: float
    patience: int
    scale: Scale
    factor: float
    recover_steps: int | None
    max_undos: int
    max_consecutive: int
    after_cap: AfterCap
    snapshots: Where


@dataclass(frozen=True)
class Decision:
    """What is done about a loss.

    Attributes:
        action: See :data:`Action`.
        message: The reason in words; empty if there is nothing to say.
        undone: How many steps are undone.
        factor: The factor by which learning rates are to be multiplied.
    """

    action: Action
    message: str = ""
    undone: int = 0
    factor: float = 1.0

    @property
    def leaves_out(self) -> bool:
        """Whether the step at hand is not made."""
        return self.action not in ("step", "hold")


class UndoJudge:
    """Decides what is done about each loss, from the losses alone, and keeps what a resumed run has to know.

    Args:
        policy: What a spike is, and what is done about it.

    Attributes:
        count: Spikes that were undone.
        lr_scale: What the learning rate has been multiplied by in all.
        off: Whether nothing is judged any more.
        records: One dict of primitives for each spike, fit for a line of JSON.
    """

    def __init__(self, policy: UndoPolicy) -> None:
        self.policy = policy
        self.detector = SpikeDetector(policy)
        self.count = 0
        self.lr_scale = 1.0
        self.off = False
        self.records: list[dict[str, Any]] = []
        self._consecutive = 0
        self._pending = 0

    @property
    def pending(self) -> int:
        """Steps that were made since the last fine loss."""
        return self._pending

    def judge(self, loss: float | None, step: int) -> Decision:
        """Decide about the next loss.

        Args:
            loss: The loss of one step's batches, averaged over all ranks; None if there is none.
            step: The number of the step at hand, for the record.
        """
        if self.off:
            return Decision("step")
        if loss is None:
            return Decision("hold")
        expected, limit = self.detector.expected, self.detector.limit
        verdict = self.detector.judge(loss)
        if verdict == "suspect":
            return Decision("hold")
        if verdict == "fine":
            self._consecutive = self._pending = 0
            return Decision("step")
        why = f"the loss is {loss:.6g}" + ("" if not expected else f" after {expected:.6g} on average")
        if math.isfinite(loss):
            why += f" (limit {limit:.6g})"
        decision = self._undo(why) if (cap := self._cap()) is None else self._give_up(why, cap)
        self.records.append(
            {
                "step": step,
                "action": decision.action,
                "loss": loss if math.isfinite(loss) else None,  # JSON has no infinity and no NaN
                "expected": expected,
                "limit": limit if math.isfinite(limit) else None,
                "undone": decision.undone,
                "restored": decision.undone > 0,
                "count": self.count,
                "lr_scale": self.lr_scale,
                "message": decision.message,
            }
        )
        return decision

    def stepped(self) -> float:
        """Note that a step was made, and return the factor by which learning rates are to be multiplied."""
        self._pending += 1
        if self.lr_scale == 1.0 or self.policy.recover_steps is None:
            return 1.0
        before = self.lr_scale
        risen = before * self.policy.factor ** (-1 / self.policy.recover_steps)
        self.lr_scale = 1.0 if risen > 1 - 1e-9 else risen  # 1, but for rounding
        return self.lr_scale / before

    def state_dict(self) -> dict[str, Any]:
        """The judge's state, as primitives."""
        return {
            "detector": self.detector.state_dict(),
            "count": self.count,
            "lr_scale": self.lr_scale,
            "off": self.off,
            "records": [dict(record) for record in self.records],
            "consecutive": self._consecutive,
            "pending": self._pending,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another judge was; the policy stays this one's.

        Raises:
            ValueError: This is not the state of a judge.
        """
        if state_dict.keys() != self.state_dict().keys():
            raise ValueError(
                f"not an UndoJudge's state: it has {sorted(state_dict)}; valid: {sorted(self.state_dict())}"
            )
        self.detector.load_state_dict(state_dict["detector"])
        self.count, self.lr_scale = int(state_dict["count"]), float(state_dict["lr_scale"])
        self.records = [dict(record) for record in state_dict["records"]]
        self._consecutive, self._pending = int(state_dict["consecutive"]), int(state_dict["pending"])
        # With a larger cap in the resumed run, judging goes on.
        self.off = bool(state_dict["off"]) and self.count >= self.policy.max_undos

    def _cap(self) -> str | None:
        """The limit that is reached, if one is."""
        if self.count >= self.policy.max_undos:
            return f"max_undos={self.policy.max_undos}"
        if self._consecutive >= self.policy.max_consecutive:
            return f"max_consecutive={self.policy.max_consecutive}"
        return None

    def _undo(self, why: str) -> Decision:
        undone, self._pending = self._pending, 0
        factor = self.policy.factor if undone else 1.0
        self.count += 1
        self._consecutive += 1
        self.lr_scale *= factor
        if undone:
            what = f"{'the last step is' if undone == 1 else f'the last {undone} steps are'} undone, "
            what += f"learning rates are multiplied by {factor:g} ({self.lr_scale:.4g} in all), and this batch"
        else:
            what = "there is no step to undo; this batch"
        message = f"{why}: {what} is left out; undo {self.count} of {self.policy.max_undos}"
        return Decision("undo", message, undone, factor)

    def _give_up(self, why: str, cap: str) -> Decision:
        action = self.policy.after_cap
        if action != "continue":
            undone, self._pending = self._pending, 0
            return Decision(action, f"{why}, and {cap} is reached: after_cap={action!r}", undone)
        self._consecutive = self._pending = 0
        self.detector.restart()
        self.off = self.count >= self.policy.max_undos
        what = "nothing is undone any more" if self.off else "this is the new level to judge by"
        return Decision("step", f"{why}, and {cap} is reached: {what}, and the step is made (after_cap='continue')")
