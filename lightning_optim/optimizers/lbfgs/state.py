"""The saved state of L-BFGS, and checks of a state that is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_optim.checks import NONNEGATIVE, Range, check_number, check_switch, whole
from lightning_optim.optimizers.lbfgs.byrd_nocedal import CompactHistory
from lightning_optim.optimizers.lbfgs.iterate import Signature, count

Kind = Literal["own", "torch", "empty"]

_ANY = Range(lambda _: True, "a number")
_COUNTS = ("iterations", "evaluations", "skipped_pairs", "failed_searches")
_NEEDED = frozenset({"history", "order", "sy", "yy", "gamma", "pending", "noise", "sizes", *_COUNTS})


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
        layout: The layout of the parameters.
        history: The pairs.
        masters: Master copies by the parameters' numbers.
        known: The loss at the weights and its gradient, if the next step is to use them.
        counts: What happened so far.
        noise: The relative error of the loss, as given or measured; None: not measured yet.
    """
    first: dict[str, Any] = {**history.state_dict(), **counts, "noise": noise, "sizes": _sizes(layout)}
    if known is not None:
        first |= {"loss": known[0], "gradient": known[1][: count(layout)].clone()}
    state: dict[int, dict[str, Any]] = {0: first}
    for number, master in masters.items():
        state.setdefault(number, {})["master"] = master
    return state


def by_position(name: str, saved: Mapping[str, Any], matched: Mapping[str, Any]) -> dict[int, Any]:
    """The saved state by the parameters' positions, instead of the numbers that they were saved under.

    Args:
        name: The optimizer's name, for messages.
        saved: The ``state_dict``.
        matched: The same with the parameters in this optimizer's order.

    Raises:
        ValueError: Parameters are in another order than they were saved in, which a history cannot follow: its vectors
            go through all of them. Or an entry of the state belongs to none of them.
    """
    for number, values in matched["state"].items():
        if not isinstance(values, Mapping):
            raise ValueError(f"{name}: parameter {number}: its state is a {type(values).__name__}; valid: a dict")
    numbers, here = ([i for group in d["param_groups"] for i in group["params"]] for d in (saved, matched))
    if any(matched["state"].values()) and numbers != here:
        raise ValueError(
            f"{name}: the saved history is of the same parameters in another order; valid: the order that they were "
            "saved in, or a state without a step"
        )
    places = {number: place for place, number in enumerate(numbers)}
    state = {}
    for number, values in matched["state"].items():
        if type(number) not in (int, str) or number not in places:
            raise ValueError(f"{name}: 'state' has an entry for {number!r}, which is no parameter")
        state[places[number]] = values
    return state


def check_state(name: str, state: Mapping[int, Mapping[Any, Any]], layout: Signature, sizes: Sequence[int]) -> Kind:
    """The kind of a saved state, after everything in it is checked.

    Args:
        name: The optimizer's name, for messages.
        state: The state by position, from :func:`by_position`.
        layout: The layout of the parameters.
        sizes: The number of real elements of each parameter, frozen ones too.

    Raises:
        ValueError: The state is another optimizer's, of other parameters, or damaged.
    """
    if not any(state.values()):
        return "empty"
    first = state.get(0, {})
    if "old_dirs" in first:
        _check_torchs(name, first, count(layout))
        return "torch"
    if not {"history", "sizes"} & set(first):
        keys = sorted({str(key) for s in state.values() for key in s})
        raise ValueError(f"{name}: parameter 0: the state of another optimizer: it has {', '.join(keys) or 'no names'}")
    saved_sizes = first.get("sizes")
    if not isinstance(saved_sizes, list) or not _same(saved_sizes, _sizes(layout)):
        raise ValueError(
            f"{name}: the saved state is for trained parameters of {saved_sizes} elements, this optimizer has "
            f"{_sizes(layout)} (sizes)"
        )
    if missing := sorted(_NEEDED - set(first)):
        raise ValueError(f"{name}: the saved state lacks {', '.join(missing)}")
    for place, values in state.items():
        known = {"master", *(_NEEDED | {"loss", "gradient"} if place == 0 else ())}
        if unknown := sorted(map(str, set(values) - known)):
            raise ValueError(
                f"{name}: parameter {place}: the state of another optimizer, or damaged: it has {', '.join(unknown)}"
            )
        if "master" in values:
            _check_tensor(f"{name}: parameter {place}: master", values["master"], sizes[place])
    _check_values(name, first, count(layout))
    return "own"


def _check_values(name: str, first: Mapping[Any, Any], elements: int) -> None:
    for key in ("history", "sy", "yy"):
        _check_tensor(f"{name}: {key}", first[key])
    if first["history"].ndim != 3:
        raise ValueError(f"{name}: history has shape {tuple(first['history'].shape)}; valid: three dimensions")
    size = first["history"].shape[1] // 2
    order = first["order"]
    if not (
        isinstance(order, list)
        and all(type(slot) is int for slot in order)
        and sorted(order) == list(range(len(order)))
        and len(order) <= size
    ):
        raise ValueError(f"{name}: order={order!r}; valid: a list of slots of the history, which has {size}")
    for key in ("sy", "yy"):
        if first[key].shape != (size, size):
            raise ValueError(f"{name}: {key} has shape {tuple(first[key].shape)}; valid: ({size}, {size})")
    check_switch(name, "pending", first["pending"])
    for key in _COUNTS:
        check_number(name, key, first[key], whole(0))
    for key in ("gamma", "noise", *(["loss"] if "gradient" in first else [])):
        value = first.get(key)
        if value is None and key == "noise":
            continue
        check_number(name, key, value, _ANY if key == "loss" else NONNEGATIVE)
    if "gradient" in first:
        _check_tensor(f"{name}: gradient", first["gradient"], elements)


def _check_torchs(name: str, first: Mapping[Any, Any], elements: int) -> None:
    steps, changes = first.get("old_stps"), first.get("old_dirs")
    if not all(vectors is None or isinstance(vectors, list) for vectors in (steps, changes)):
        raise ValueError(f"{name}: torch's old_dirs and old_stps are lists, not {type(changes)} and {type(steps)}")
    if len(steps or ()) != len(changes or ()):
        raise ValueError(f"{name}: torch's history has {len(changes or ())} old_dirs and {len(steps or ())} old_stps")
    for vector in (*(changes or ()), *(steps or ())):
        if isinstance(vector, Tensor) and vector.numel() != elements:
            raise ValueError(
                f"{name}: torch's history has vectors of {vector.numel()} elements, the trained parameters have "
                f"{elements} (torch counts frozen ones, which have no history here)"
            )
        _check_tensor(f"{name}: torch's history", vector, elements)


def _check_tensor(where: str, value: Any, elements: int | None = None) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} is a {type(value).__name__}; valid: a tensor")
    if value.is_nested or value.layout != torch.strided or value.is_meta or not value.is_floating_point():
        raise ValueError(
            f"{where} is of {value.dtype} and layout {value.layout} on {value.device}; valid: a dense tensor of "
            "floating-point numbers"
        )
    if elements is not None and (value.ndim != 1 or value.numel() != elements):
        raise ValueError(f"{where} has shape {tuple(value.shape)}; valid: ({elements},)")


def _same(a: Any, b: Any) -> bool:
    """Whether two nested lists of whole numbers are equal; the first may contain anything."""
    if isinstance(b, list):
        return isinstance(a, list | tuple) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is int and bool(a == b)


def torchs_pairs(state: Mapping[Any, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs (s, y) of ``torch.optim.LBFGS``, the oldest first; its last step is not yet among them."""
    steps, changes = state[0].get("old_stps") or (), state[0].get("old_dirs") or ()
    for s, y in zip(steps, changes, strict=True):
        if torch.dot(s.double(), y.double()) > 0:
            yield s, y


def _sizes(layout: Signature) -> list[list[int]]:
    return [[elements for elements, _ in group] for group in layout]
