"""State that is made for a step which is still to come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class NewState:
    """What a plan has put into an optimizer's state, until a step has used it.

    A first step may be special (SGD's dampening), and is recognized by the slots that are missing. So those of a step
    that does not take place must go again, one by one: an option that is switched on adds a slot to state that is
    there already.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, str], tuple[Tensor, dict[str, Any], list[Tensor]]] = {}
        self._begun: list[Tensor] = []

    def of(self, state: Mapping[Any, Any], p: Tensor) -> Any:
        """What a parameter has in the optimizer's state: an empty dict if it had nothing."""
        if p not in state:
            self._begun.append(p)
        return state[p]

    def put(self, p: Tensor, values: dict[str, Any], name: str, tensor: Tensor) -> None:
        """Give a parameter's state a slot that it had not."""
        # Noted down first: what is interrupted then, or has run out of memory, has no trace that nobody knows of.
        self._made.setdefault((id(values), name), (p, values, []))[2].append(tensor)
        values[name] = tensor

    def replace(self, p: Tensor, values: dict[str, Any], name: str, tensor: Tensor) -> None:
        """Give a slot, which may be one that was made here, another tensor of the same value."""
        if (id(values), name) in self._made:
            self.put(p, values, name, tensor)
        else:
            values[name] = tensor

    def forget(self, state: Mapping[Any, Any]) -> None:
        """Take out what was made. What was loaded since is another's.

        Args:
            state: The optimizer's.
        """
        for (_, name), (p, values, made) in self._made.items():
            if state.get(p) is values and any(values.get(name) is tensor for tensor in made):
                del values[name]
        for p in self._begun:
            if state.get(p) == {}:
                state.pop(p)  # type: ignore[attr-defined] # a dict, whatever else its owner may be
