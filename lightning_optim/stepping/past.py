"""A step that can be undone."""

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
    """What a step has written, and how to undo it.

    Attributes:
        written: The buckets that were written.
        states: For each parameter, the state that the step wrote to.
        new: The part of the state that was made for the step.
        undo: The buffers with the old values.
        restores: The writes that undo shared slots and step counts.
        progress: How far the undo has come.
    """

    written: list[Planned]
    states: dict[Tensor, Any]
    new: NewState
    undo: UndoBuffers
    restores: Sequence[Write] = ()
    progress: Progress = field(default_factory=Progress)

    def take_back(self, current: Mapping[Any, Any]) -> None:
        """Restore the old values of weights and state; once begun, this is finished even if it is interrupted.

        Args:
            current: The optimizer's state. State that was loaded since the step is left alone.
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
                    continue  # another state was loaded since
                for slot in slots:
                    yield partial(self.undo.give_back, p, slot, state[slot])
                if planned.bucket.update.program.counts_steps:
                    yield partial(state["step"].copy_, counting.previous(state["step"]))
