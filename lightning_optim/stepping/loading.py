"""From a ``state_dict`` to an optimizer's groups and state, with everything checked before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_optim.engines.memory import is_dense
from lightning_optim.primitives import primitive
from lightning_optim.rules.policy import KAHAN_SLOT
from lightning_optim.rules.rule import UPDATES, Rule
from lightning_optim.rules.slots import Slot
from lightning_optim.stepping.group_keys import near_miss
from lightning_optim.stepping.names import by_name
from lightning_optim.stepping.options import UNDECLARED, Declared, check_option, known_options
from lightning_optim.stepping.preparing import zeros_for

if TYPE_CHECKING:
    from lightning_optim.stepping.method import Group
    from lightning_optim.stepping.plan import Planner

#: Options that must be in the saved state of every optimizer that has them.
OF_ANY_STATE = ("lr", "betas", "eps", "momentum", "dampening", "nesterov", "weight_decay", UPDATES)

#: Options that optimizers of several kinds have, or all of them.
_GENERAL = {*OF_ANY_STATE, "amsgrad", "maximize", "cautious", "decoupled_weight_decay", "train_mode"}

#: Above this, a float64 cannot represent every whole number of steps.
_MOST_STEPS = 2**53


def readable(optimizer: str, groups: Sequence[Group], state_dict: Any) -> dict[str, Any]:
    """Check the form of a ``state_dict``, and return it with the parameters of each group in this optimizer's order.

    Args:
        optimizer: The optimizer's name, for messages.
        groups: Its current groups.
        state_dict: What was saved.

    Raises:
        TypeError: It is no dict.
        ValueError: It lacks a key, its groups or the numbers in them have a wrong form, or names do not match
            (:func:`~lightning_optim.stepping.names.by_name`).
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{optimizer}: a state_dict that is a {type(state_dict).__name__}; valid: a dict")
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(
                f"{optimizer}: not an optimizer's state_dict: no {key!r}; it has {sorted(map(str, state_dict))}"
            )
    if not isinstance(state_dict["state"], Mapping):
        raise ValueError(f"{optimizer}: 'state' is a {type(state_dict['state']).__name__}; valid: a dict by parameter")
    saved = state_dict["param_groups"]
    if not isinstance(saved, list | tuple) or not all(isinstance(g, dict) and "params" in g for g in saved):
        raise ValueError(f"{optimizer}: not an optimizer's state_dict: a param group is no dict with 'params'")
    for index, group in enumerate(saved):
        params = group["params"]
        if not isinstance(params, list | tuple) or not all(type(number) in (int, str) for number in params):
            raise ValueError(
                f"{optimizer}: saved param group {index}: params={params!r}; valid: a list of the parameters' numbers"
            )
    return by_name(optimizer, groups, state_dict)


def load_groups(
    optimizer: str,
    groups: Sequence[Group],
    state_dict: Mapping[str, Any],
    defaults: Mapping[str, Any],
    required: Sequence[str],
    check: Callable[[Group], None],
    constructor: Mapping[str, Any],
    declared: Declared = UNDECLARED,
) -> list[Group]:
    """The saved param groups with this optimizer's parameters.

    Args:
        optimizer: The optimizer's name, for messages.
        groups: Its current groups.
        state_dict: What was saved, as :func:`readable` returns it.
        defaults: Its options; those that were not saved (torch's classes have fewer) take their defaults.
        check: The optimizer's own check of a group's options together.
        required: Options that any state of this kind of optimizer has.
        constructor: The constructor's other options.
        declared: What its class declares about the options.

    Raises:
        ValueError: Groups of other sizes, a parameter twice, or another optimizer's options.
        TypeError: An option of the wrong type.
    """
    saved = state_dict["param_groups"]
    ours, theirs = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved]
    if ours != theirs:
        raise ValueError(
            f"{optimizer}: the saved state is for param groups of {theirs} parameters, this optimizer has {ours}"
        )
    numbers = [number for group in saved for number in group["params"]]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{optimizer}: a parameter is twice in the saved param groups: {numbers}")
    loaded = []
    for index, (group, values) in enumerate(zip(groups, saved, strict=True)):
        where = f"{optimizer}: saved param group {index}"
        new = {key: _own_option(where, key, value) for key, value in values.items() if key != "params"}
        missing = [name for name in required if name not in new]
        if missing:
            raise ValueError(
                f"{where} has no {', '.join(missing)}: the state of another optimizer? It has {sorted(new)}"
            )
        if (telling := defaults.keys() - _GENERAL) and not telling & new.keys():
            raise ValueError(
                f"{where} has no {', '.join(sorted(telling))}: the state of another optimizer? It has {sorted(new)}"
            )
        # Only known options of other optimizers are an error: a user's own key must not make a run lose its state.
        others = known_options() - {*defaults, *constructor, *group}
        if foreign := sorted(set(new) & others):
            raise ValueError(
                f"{where} has {', '.join(map(repr, foreign))}: the state of another "
                f"optimizer? {optimizer}'s options are {', '.join(sorted(defaults))}"
            )
        for key in new.keys() - defaults.keys() - group.keys():
            if (meant := near_miss(key, defaults)) and meant not in new:
                raise ValueError(f"{where} has {key!r}, and no {meant!r} (did you mean that?)")
        for name, default in defaults.items():
            check_option(optimizer, name, new.setdefault(name, default), default, declared)
        new = {"params": group["params"], **new}
        check(new)
        if "param_names" in group:
            new["param_names"] = list(group["param_names"])
        loaded.append(new)
    return loaded


def _own_option(where: str, key: Any, value: Any) -> Any:
    """A copy of a group's value that is shared with nobody."""
    if not isinstance(key, str):
        raise ValueError(f"{where} has the key {key!r}, a {type(key).__name__}; valid: strings")
    try:
        with torch.inference_mode(False):
            return value.detach().clone() if isinstance(value, Tensor) else deepcopy(primitive(value))
    except Exception as error:  # copying an arbitrary object may raise anything
        raise ValueError(f"{where}: {key}: a {type(value).__name__} that cannot be copied ({error})") from error


def load_state(
    optimizer: str,
    groups: Sequence[Group],
    state_dict: Mapping[str, Any],
    planner_of: Callable[[Group, Tensor], Planner],
    rules: Sequence[Rule],
) -> defaultdict[Any, Any]:
    """The saved state as this optimizer's: its own copies, on each parameter's device, in its storage types.

    Args:
        optimizer: The optimizer's name, for messages.
        groups: From :func:`load_groups`.
        state_dict: What was saved, as :func:`readable` returns it.
        planner_of: Returns the planner that knows the state of a group's parameter.
        rules: All rules by which this optimizer may have stepped a parameter.

    Raises:
        ValueError: A parameter's state is another optimizer's, has another shape, or lacks something.
    """
    state: defaultdict[Any, Any] = defaultdict(dict)
    saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    places = [(group, p) for group in groups for p in group["params"]]
    by_id = dict(zip(saved_ids, places, strict=True))
    for key, values in state_dict["state"].items():
        if type(key) not in (int, str) or (type(key) is int and key not in by_id):
            raise ValueError(
                f"{optimizer}: 'state' has an entry for {key!r}, which is no parameter; the saved param groups have "
                f"{saved_ids[:8]}{' ...' if len(saved_ids) > 8 else ''}"
            )
        if key not in by_id:
            state[key] = values  # not a parameter's: kept as it is, as torch does
            continue
        group, p = by_id[key]
        if not isinstance(values, Mapping):
            raise ValueError(f"{optimizer}: parameter {key}: its state is a {type(values).__name__}; valid: a dict")
        values = {name: value for name, value in values.items() if value is not None}
        if values:
            state[p] = _load_one(f"{optimizer}: parameter {key}", group, p, values, planner_of(group, p), rules)
    return state


def _load_one(
    where: str, group: Group, p: Tensor, values: Mapping[Any, Any], planner: Planner, rules: Sequence[Rule]
) -> dict[str, Any]:
    """One parameter's state, if this optimizer may have saved it.

    The slots of an option that was switched on since the parameter's last step are missing; the next step makes them.
    So if any slot of a rule is there, all its slots that do not depend on an option must be. If the group's own rule
    has such slots and none is there, another rule of this optimizer must have stepped the parameter.
    """
    known = {"step": None, KAHAN_SLOT: None} | {slot: None for rule in rules for slot in rule.all_slots}
    always = {rule: {name for name, slot in rule.slots.items() if not slot.is_optional} for rule in rules}
    used = [rule for rule in rules if set(rule.all_slots) & set(values)]
    slots = planner.slots(group, p)
    if not used and (always[planner.method.rule] or _come_together(planner.method.rule, (), slots)):
        used = [planner.method.rule]
    needed = {slot for rule in used for slot in always[rule] | _come_together(rule, values, slots)}
    needed |= {"step"} if any(rule.counts_steps for rule in used) else set()
    if set(values) - set(known) or needed - set(values):
        raise ValueError(
            f"{where}: the state of another optimizer, or damaged: it has {sorted(map(str, values))}, "
            f"this one needs {sorted(needed or always[planner.method.rule])}"
        )
    loaded: dict[str, Any] = {}
    for name, value in values.items():
        if name == "step":
            loaded[name] = _load_step(where, value)
        elif name != KAHAN_SLOT or name in slots:
            slot = next((rule.slots[name] for rule in rules if name in rule.slots), Slot())
            loaded[name] = _load_slot(f"{where}: {name}", p, value, planner.slot_dtype(p, name), slot)
    return loaded


def _come_together(rule: Rule, there: Collection[Any], own: Collection[str]) -> set[str]:
    """The optional slots that are needed because slots of one flag, or slots of its absence, exist only together.

    Args:
        rule: The rule.
        there: Names of the values that were saved.
        own: The slots that the parameter has now.
    """
    needed: set[str] = set()
    for flag in {flag for slot in rule.slots.values() for flag in (slot.when, slot.unless) if flag is not None}:
        on = {name for name, slot in rule.slots.items() if slot.when == flag}
        off = {name for name, slot in rule.slots.items() if slot.unless == flag}
        if on & set(there):
            needed |= on
        elif off & set(there):
            needed |= off
        elif on and off:
            needed |= (on | off) & set(own)
    return needed


def _load_slot(where: str, p: Tensor, value: Any, dtype: torch.dtype, slot: Slot) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} is a {type(value).__name__}; valid: a tensor")
    if value.is_nested or value.layout != torch.strided or (value.is_meta and not p.is_meta):
        kind = "a nested tensor" if value.is_nested else f"of layout {value.layout} on {value.device}"
        raise ValueError(f"{where} is {kind}; valid: a dense tensor with values")
    if value.shape != (shape := _shape(slot, p)):
        valid = "" if shape == p.shape else f"; valid: {tuple(shape)}"
        raise ValueError(f"{where} has shape {tuple(value.shape)}, the parameter {tuple(p.shape)}{valid}")
    is_complex = p.is_complex() and not slot.is_scalar
    if value.is_complex() != is_complex or not (value.is_complex() or value.is_floating_point()):
        raise ValueError(f"{where} has dtype {value.dtype}; valid: what can be stored as {dtype}")
    memory_format = torch.preserve_format if is_dense(p) else torch.contiguous_format
    # Also in inference mode it must be a normal tensor, since steps will write to it.
    with torch.inference_mode(False), torch.no_grad():
        if slot.is_plain:
            own = torch.empty_like(p, dtype=dtype, memory_format=memory_format, requires_grad=False)
        else:
            own = zeros_for(p, slot, dtype)
        try:
            own.copy_(value)
        except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
            raise ValueError(
                f"{where} is a {type(value).__name__} of {value.dtype} that cannot be read ({error}); valid: what can "
                f"be stored as {dtype}"
            ) from error
    return own


def _shape(slot: Slot, p: Tensor) -> torch.Size:
    try:
        return slot.shape_for(p.shape)
    except ValueError:  # a weight that has no such slot
        return p.shape


def _load_step(where: str, value: Any) -> Tensor:
    number = value
    try:
        if isinstance(value, Tensor):
            readable_as_one = value.layout == torch.strided and not (value.is_quantized or value.is_complex())
            number = value.item() if readable_as_one and value.dtype != torch.bool else value
        number = primitive(number)
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(f"a {type(number).__name__}")
        step = float(number)
    except (TypeError, ValueError, RuntimeError, NotImplementedError, OverflowError) as error:
        raise ValueError(f"{where}: step={value!r} is not a number of steps ({error})") from error
    if not (0 <= step <= _MOST_STEPS and step % 1 == 0):
        raise ValueError(f"{where}: step={number!r}; valid: a whole number from 0 to 2**53")
    with torch.inference_mode(False):
        return torch.tensor(step, dtype=torch.float32, device="cpu")
