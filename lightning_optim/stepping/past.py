"""A step that can be taken back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from lightning_optim.engines.progress import Progress, Write, carry_through
from lightning_optim.rules import counting
from lightning_optim.stepping.new_state import NewState
from lightning_optim.stepping.plan import Planned
from lightning_optim.stepping.undo import UndoBuffers


@dataclass(frozen=True)
class Past:
    """What a step has written.

    Attributes:
        written: The buckets.
        states: Of each parameter, as it was then.
        new: What of it the step has made.
        undo: Where the old values are.
        restores: The writes that take back what all parameters have in common.
        progress: How far they are back.
    """

    written: list[Planned]
    states: dict[Tensor, Any]
    new: NewState
    undo: UndoBuffers
    restores: Sequence[Write] = ()
    progress: Progress = field(default_factory=Progress)

    def take_back(self, current: Mapping[Any, Any]) -> None:
        """Give weights and state their old values; once it has begun, it is finished before an interrupt leaves it.

        Args:
            current: The optimizer's state. What was loaded since is left alone.
        """
        carry_through(partial(self._go_on, current), lambda: self.progress.begun)

    def _go_on(self, current: Mapping[Any, Any]) -> None:
        if self.progress.begun:
            self.progress.finish()
        else:
            self.progress.write([*self._writes(current), *self.restores, partial(self.new.forget, current)])

    def _writes(self, current: Mapping[Any, Any]) -> Iterator[Write]:
        for planned in reversed(self.written):  # weights that share memory were updated one after the other
            slots = planned.bucket.update.slots
            for p in reversed(planned.params):
                yield partial(self.undo.give_back, p, "p", p)
                state: dict[str, Any] | None = self.states[p]
                if current.get(p) is not state or state is None:
                    continue  # another was loaded since
                for slot in slots:
                    yield partial(self.undo.give_back, p, slot, state[slot])
                if planned.bucket.update.program.counts_steps:
                    yield partial(state["step"].copy_, counting.previous(state["step"]))
