"""A step that can be taken back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_optim.optimizers.new_state import NewState
from lightning_optim.optimizers.plan import Planned
from lightning_optim.optimizers.undo import UndoBuffers


@dataclass(frozen=True)
class Past:
    """What a step has written.

    Attributes:
        written: The buckets.
        states: Of each parameter, as it was then.
        new: What of it the step has made.
        undo: Where the old values are.
    """

    written: list[Planned]
    states: dict[Tensor, Any]
    new: NewState
    undo: UndoBuffers

    def take_back(self, current: Mapping[Any, Any]) -> None:
        """Give weights and state their old values.

        Args:
            current: The optimizer's state. What was loaded since is left alone.
        """
        for planned in reversed(self.written):  # weights that share memory were updated one after the other
            slots = planned.bucket.update.slots
            for p in reversed(planned.params):
                self.undo.give_back(p, "p", p)
                state = self.states[p]
                if state is None or current.get(p) is not state:
                    continue  # another was loaded since
                for slot in slots:
                    self.undo.give_back(p, slot, state[slot])
                if "step" in planned.bucket.update.program.scalars:
                    state["step"] -= 1
        self.new.forget(current)
