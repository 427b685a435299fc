"""What L-BFGS saves, and whether something that was saved is for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_optim.optimizers.byrd_nocedal import CompactHistory
from lightning_optim.optimizers.iterate import Signature, count

Kind = Literal["own", "torch", "empty"]


def own_state(
    layout: Signature,
    history: CompactHistory,
    masters: Mapping[int, Tensor],
    known: tuple[float, Tensor] | None,
    counts: Mapping[str, int],
    noise: float | None,
) -> dict[int, dict[str, Any]]:
    """The ``"state"`` of a state_dict.

    Args:
        layout: Of the parameters.
        history: The pairs.
        masters: Master copies by the parameters' numbers.
        known: The loss at the weights and its gradient, if the next step is to use them.
        counts: What happened so far.
        noise: What was measured.
    """
    first: dict[str, Any] = {**history.state_dict(), **counts, "noise": noise, "sizes": _sizes(layout)}
    if known is not None:
        first |= {"loss": known[0], "gradient": known[1][: count(layout)].clone()}
    state: dict[int, dict[str, Any]] = {0: first}
    for number, master in masters.items():
        state.setdefault(number, {})["master"] = master
    return state


def check_state(name: str, state: Mapping[Any, Any], layout: Signature) -> Kind:
    """What kind of state this is.

    Raises:
        ValueError: Another optimizer's, of other parameters, or damaged.
    """
    if not any(state.values()):
        return "empty"
    first = state.get(0)
    if isinstance(first, Mapping) and "old_dirs" in first:
        for vector in (*(first["old_dirs"] or ()), *(first.get("old_stps") or ())):
            if vector.numel() != count(layout):
                raise ValueError(
                    f"{name}: torch's history has vectors of {vector.numel()} elements, the trained parameters have "
                    f"{count(layout)} (torch counts frozen ones, which have no history here)"
                )
        return "torch"
    if not isinstance(first, Mapping) or "history" not in first:
        keys = sorted({str(key) for s in state.values() if isinstance(s, Mapping) for key in s})
        raise ValueError(f"{name}: the state of another optimizer: it has {', '.join(keys) or 'no names'}")
    if first.get("sizes") != _sizes(layout):
        raise ValueError(
            f"{name}: the saved state is for trained parameters of {first.get('sizes')} elements, this optimizer has "
            f"{_sizes(layout)}"
        )
    needed = {"iterations", "evaluations", "skipped_pairs", "failed_searches", "noise"}
    if missing := sorted(needed - set(first)):
        raise ValueError(f"{name}: the saved state lacks {', '.join(missing)}")
    return "own"


def torchs_pairs(state: Mapping[Any, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs (s, y) of ``torch.optim.LBFGS``, the oldest first; its last step is not yet among them."""
    steps, changes = state[0].get("old_stps") or (), state[0].get("old_dirs") or ()
    for s, y in zip(steps, changes, strict=True):
        if torch.dot(s.double(), y.double()) > 0:
            yield s, y


def _sizes(layout: Signature) -> list[list[int]]:
    return [[elements for elements, _ in group] for group in layout]
