"""A record of the state that is made for a coming step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class NewState:
    """The tensors that a plan has put into an optimizer's state, until a step has used them.

    A first step may be special (SGD's dampening), and is recognized by missing slots. So slots that were made for a
    step that does not take place must be removed again. This is done slot by slot, since an option that is switched on
    adds a slot to a parameter that has state already.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, str], tuple[Tensor, dict[str, Any], list[Tensor]]] = {}
        self._begun: list[Tensor] = []

    def of(self, state: Mapping[Any, Any], p: Tensor) -> Any:
        """A parameter's entry in the optimizer's state: a new, empty dict if it had none."""
        if p not in state:
            self._begun.append(p)
        return state[p]

    def put(self, p: Tensor, values: dict[str, Any], name: str, tensor: Tensor) -> None:
        """Add a slot to a parameter's state."""
        # Recorded first, so that an interrupt leaves nothing in the state that is not recorded.
        self._made.setdefault((id(values), name), (p, values, []))[2].append(tensor)
        values[name] = tensor

    def replace(self, p: Tensor, values: dict[str, Any], name: str, tensor: Tensor) -> None:
        """Replace a slot's tensor by another one of the same value; the slot may have been made here."""
        if (id(values), name) in self._made:
            self.put(p, values, name, tensor)
        else:
            values[name] = tensor

    def forget(self, state: Mapping[Any, Any]) -> None:
        """Remove what was made here; state that was loaded since is left alone.

        Args:
            state: The optimizer's state.
        """
        for (_, name), (p, values, made) in self._made.items():
            if state.get(p) is values and any(values.get(name) is tensor for tensor in made):
                del values[name]
        for p in self._begun:
            if state.get(p) == {}:
                state.pop(p)  # type: ignore[attr-defined] # a dict, whatever else its owner may be
