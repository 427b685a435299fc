"""From a ``state_dict`` to an optimizer's groups and state, with everything checked before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_optim.engines.ambient import of_normal_tensors
from lightning_optim.engines.memory import is_dense
from lightning_optim.optimizers.options import CHOICES, RANGES, SWITCHES, check_option
from lightning_optim.rules.policy import KAHAN_SLOT

if TYPE_CHECKING:
    from lightning_optim.optimizers.plan import Group, Planner


def load_groups(
    optimizer: str,
    groups: Sequence[Group],
    state_dict: Mapping[str, Any],
    defaults: Mapping[str, Any],
    required: Sequence[str],
    check: Callable[[Group], None],
) -> list[Group]:
    """The saved param groups with this optimizer's parameters.

    Args:
        optimizer: The optimizer's name, for messages.
        groups: Its current groups.
        state_dict: What was saved.
        defaults: Its options; those that were not saved (torch's classes have fewer) take their defaults.
        check: The optimizer's own check of a group's options together.
        required: Options that any state of this kind of optimizer has.

    Raises:
        ValueError: Other groups, other numbers of parameters, or another optimizer's options.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(
                f"{optimizer}: not an optimizer's state_dict: no {key!r}; it has {sorted(map(str, state_dict))}"
            )
    if not isinstance(state_dict["state"], Mapping):
        raise ValueError(f"{optimizer}: 'state' is a {type(state_dict['state']).__name__}; valid: a dict by parameter")
    saved = deepcopy(list(state_dict["param_groups"]))
    if not all(isinstance(group, dict) and "params" in group for group in saved):
        raise ValueError(f"{optimizer}: not an optimizer's state_dict: a param group is no dict with 'params'")
    ours, theirs = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved]
    if ours != theirs:
        raise ValueError(
            f"{optimizer}: the saved state is for param groups of {theirs} parameters, this optimizer has {ours}"
        )
    for index, (group, new) in enumerate(zip(groups, saved, strict=True)):
        missing = [name for name in required if name not in new]
        if missing:
            raise ValueError(
                f"{optimizer}: saved param group {index} has no {', '.join(missing)}: the state of another optimizer? "
                f"It has {sorted(set(new) - {'params'})}"
            )
        # Only what is known as another optimizer's option: a key of the user's own must not make a run lose its state.
        foreign = sorted(set(new) & (SWITCHES | {*RANGES, *CHOICES}) - set(defaults) - set(group))
        if foreign:
            raise ValueError(
                f"{optimizer}: saved param group {index} has {', '.join(map(repr, foreign))}: the state of another "
                f"optimizer? {optimizer}'s options are {', '.join(sorted(defaults))}"
            )
        for name, default in defaults.items():
            check_option(optimizer, name, new.setdefault(name, default), default)
        new["params"] = group["params"]
        check(new)
        if "param_names" in group:
            new.setdefault("param_names", group["param_names"])
    return saved


@of_normal_tensors
def load_state(
    optimizer: str,
    groups: Sequence[Group],
    state_dict: Mapping[str, Any],
    planner_of: Callable[[Group], Planner],
) -> defaultdict[Any, Any]:
    """The saved state as this optimizer's: its own copies, on each parameter's device, in its storage types.

    Raises:
        ValueError: A parameter's state is another optimizer's, has another shape, or lacks something.
    """
    state: defaultdict[Any, Any] = defaultdict(dict)
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    if len(set(saved_ids)) < len(saved_ids):
        raise ValueError(f"{optimizer}: a parameter is twice in the saved param groups: {saved_ids}")
    places = [(group, p) for group in groups for p in group["params"]]
    by_id = dict(zip(saved_ids, places, strict=True))
    for key, values in state_dict["state"].items():
        if key not in by_id:
            state[key] = values  # not a parameter's: kept as it is, as torch does
            continue
        group, p = by_id[key]
        if not isinstance(values, Mapping):
            raise ValueError(f"{optimizer}: parameter {key}: its state is a {type(values).__name__}; valid: a dict")
        values = {name: value for name, value in values.items() if value is not None}
        if values:
            state[p] = _load_one(f"{optimizer}: parameter {key}", group, p, values, planner_of(group))
    return state


def _load_one(where: str, group: Group, p: Tensor, values: Mapping[str, Any], planner: Planner) -> dict[str, Any]:
    slots = planner.slots(group, p)
    known = {*planner.method.rule.all_slots, "step", KAHAN_SLOT}
    unknown = sorted(set(values) - known)
    missing = sorted(set(slots) - {KAHAN_SLOT} - set(values))
    if planner.method.rule.counts_steps and "step" not in values:
        missing.append("step")
    if unknown or missing:
        raise ValueError(
            f"{where}: the state of another optimizer, or damaged: it has {sorted(values)}, "
            f"this one needs {sorted({*slots} - {KAHAN_SLOT} | ({'step'} if planner.counts_steps() else set()))}"
        )
    loaded: dict[str, Any] = {}
    if "step" in values:
        loaded["step"] = _load_step(where, values["step"])
    for slot in slots:
        if slot not in values:
            continue  # created with zeros at the next step: rounding="kahan" is new in this run
        value = values[slot]
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: {slot} is a {type(value).__name__}; valid: a tensor")
        if value.shape != p.shape:
            raise ValueError(f"{where}: {slot} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}")
        dtype = planner.slot_dtype(p, slot)
        if value.is_complex() != p.is_complex() or not (value.is_complex() or value.is_floating_point()):
            raise ValueError(f"{where}: {slot} has dtype {value.dtype}; valid: what can be stored as {dtype}")
        if is_dense(p):
            own = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
        else:
            own = torch.empty_like(p, dtype=dtype, memory_format=torch.contiguous_format, requires_grad=False)
        loaded[slot] = own.copy_(value)
    return loaded


def _load_step(where: str, value: Any) -> Tensor:
    try:
        step = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: step={value!r} is not a number") from error
    if not 0 <= step < float("inf"):
        raise ValueError(f"{where}: step={step}; valid: a finite number >= 0")
    return torch.tensor(step, dtype=torch.float32, device="cpu")
