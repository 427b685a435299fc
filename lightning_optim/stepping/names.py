"""Matching saved parameters to an optimizer's: by name where both sides know names, else by position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from lightning_optim.param_groups import own_name

Group = Mapping[str, Any]


def by_name(optimizer: str, groups: Sequence[Group], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` with the parameters of each group in this optimizer's order.

    Names are compared without what DDP, ``torch.compile``, FSDP and checkpointing put into them. The groups themselves
    are matched by position, as their options and schedules are: within a group the order does not matter, but a name
    that was saved in another group is an error. If the state or the optimizer has no names, the state is returned as
    it is. Otherwise the returned names are this optimizer's.

    Args:
        optimizer: The optimizer's name, for messages.
        groups: Its current groups.
        state_dict: What was saved, with ``"param_groups"`` in which each ``"params"`` is a list.

    Raises:
        ValueError: Names do not match; the message lists missing and unexpected ones.
    """
    saved = state_dict["param_groups"]
    theirs = _all_known(_saved_names(optimizer, index, group) for index, group in enumerate(saved))
    ours = _all_known(map(_own_names, groups))
    if ours is None or theirs is None or ours == theirs:
        return dict(state_dict)
    # `torch.distributed.checkpoint` has names in place of numbers, and brings only these into the optimizer's order.
    numbers = [list(group["params"]) for group in saved]
    if all(isinstance(number, str) for group in numbers for number in group):
        theirs = [list(map(own_name, group)) for group in numbers]
        if sorted(chain(*theirs)) != sorted(chain(*ours)):
            return dict(state_dict)
    _refuse_other_names(optimizer, ours, theirs)
    return {**state_dict, "param_groups": list(map(_in_order, saved, theirs, ours, groups))}


def _all_known(names: Iterable[list[str] | None]) -> list[list[str]] | None:
    """The names of all groups; None if a group has none."""
    found = list(names)
    known = [group for group in found if group is not None]
    return known if len(known) == len(found) else None


def _own_names(group: Group) -> list[str] | None:
    """The names of an optimizer's group, if it has one for each parameter."""
    names = group.get("param_names")
    if names is None or len(names) != len(group["params"]):
        return None
    return list(map(own_name, names))


def _saved_names(optimizer: str, index: int, group: Group) -> list[str] | None:
    names = group.get("param_names")
    if names is None:
        return None
    if (
        not isinstance(names, list | tuple)
        or len(names) != len(group["params"])
        or not all(isinstance(name, str) for name in names)
    ):
        raise ValueError(
            f"{optimizer}: saved param group {index} has param_names={names!r} for {len(group['params'])} parameters; "
            "valid: a list with the name of each"
        )
    return list(map(own_name, names))


def _refuse_other_names(optimizer: str, ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]]) -> None:
    """Check that each group has the names that it was saved with, whatever their order, and each name once."""
    here = {name: index for index, names in enumerate(ours) for name in names}
    there = {name: index for index, names in enumerate(theirs) for name in names}
    complaints = []
    if len(ours) != len(theirs):
        complaints.append(f"it has {len(theirs)} param groups, this optimizer {len(ours)}")
    if missing := sorted(here.keys() - there.keys()):
        complaints.append(f"it lacks {_shown(missing)}")
    if unexpected := sorted(there.keys() - here.keys()):
        complaints.append(f"it has {_shown(unexpected)}, which this optimizer has not")
    if moved := sorted(name for name in here.keys() & there.keys() if here[name] != there[name]):
        places = [f"{name!r} (from group {there[name]} to {here[name]})" for name in moved]
        complaints.append(f"parameters changed their param group: {_shown(places, quote=False)}")
    if complaints:
        raise ValueError(
            f"{optimizer}: the saved state is of other parameters: {'; '.join(complaints)}. Valid: the same names in "
            "each group, in any order; without 'param_names' in the saved groups, parameters are taken by position"
        )
    twice = {name for side in (ours, theirs) for name, times in Counter(chain(*side)).items() if times > 1}
    if twice:
        raise ValueError(
            f"{optimizer}: parameters in another order than they were saved in, and names that are there twice: "
            f"{_shown(sorted(twice))}; valid: the saved order, or a name of its own for each parameter"
        )


def _in_order(saved: Group, theirs: Sequence[str], ours: Sequence[str], group: Group) -> dict[str, Any]:
    place = {name: index for index, name in enumerate(theirs)}
    numbers = [saved["params"][place[name]] for name in ours]
    return {**saved, "params": numbers, "param_names": list(group["param_names"])}


def _shown(names: Sequence[str], quote: bool = True) -> str:
    first = ", ".join(map(repr, names[:8]) if quote else names[:8])
    return first + (f", ... ({len(names)} in all)" if len(names) > 8 else "")
