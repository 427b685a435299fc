"""Checks of an optimizer's options: every error names the value and what would be valid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_optim.checks import (
    FINITE,
    FRACTION,
    NONNEGATIVE,
    POSITIVE,
    POSITIVE_OR_NONE,
    Range,
    check_choice,
    check_number,
    check_numbers,
    check_switch,
    whole,
)
from lightning_optim.stepping.tensors import problem_of_weight
from lightning_optim.warnings import warn_user

#: Valid ranges of the options that mean the same in every optimizer that has them.
RANGES: dict[str, Range] = {
    "lr": NONNEGATIVE,
    "adamw_lr": NONNEGATIVE,
    "betas": FRACTION,
    "eps": NONNEGATIVE,
    "weight_decay": NONNEGATIVE,
    "momentum": NONNEGATIVE,
    "dampening": FINITE,
    "ns_steps": Range(lambda x: 1 <= x < 100 and x % 1 == 0, "a number of steps from 1 to 99"),
    "precondition_frequency": whole(1),
    "max_precond_dim": whole(1),
    "shampoo_beta": FRACTION.or_none(),
    "max_weight_norm": POSITIVE_OR_NONE,
    "max_trust_ratio": POSITIVE_OR_NONE,
    "max_grad_norm": POSITIVE,
}

#: Valid words by option name.
CHOICES: dict[str, tuple[str, ...]] = {
    "adjust_lr": ("original", "match_rms_adamw"),
    "ns_coefficients": ("muon", "polar_express"),
}

#: Switches of single rules. With the ranges and choices, they are what tells one optimizer's saved options from
#: another's.
SWITCHES = frozenset({"adapt_1d", "amsgrad", "nesterov", "stacked", "use_muon"})


def check_option(optimizer: str, name: str, value: Any, default: Any) -> None:
    """Check one option of a param group.

    Args:
        optimizer: The optimizer's name, for the message.
        name: The option's name.
        value: Its value.
        default: The optimizer's default, whose type (bool, number or tuple of numbers) the value must have.

    Raises:
        ValueError: A value out of its range.
        TypeError: A value of another type.
    """
    valid = RANGES.get(name, FINITE)
    if isinstance(default, bool):
        check_switch(optimizer, name, value)
    elif isinstance(default, tuple):
        check_numbers(optimizer, name, value, valid, len(default), tensors=True)
    elif name in CHOICES:
        check_choice(optimizer, name, value, CHOICES[name])
    elif name in RANGES or isinstance(default, Real):
        check_number(optimizer, name, value, valid, tensors=True)


def check_options(optimizer: str, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check all options that a param group sets.

    Raises:
        ValueError: An option out of its range.
        TypeError: An option of the wrong type.
    """
    for name, default in defaults.items():
        if name in group:
            check_option(optimizer, name, group[name], default)


def each_once(group: dict[str, Any]) -> None:
    """Take a parameter that is in a param group twice once, with the warning that torch gives for it.

    What torch refuses (a set, what is no tensor) is left for it to refuse.
    """
    params = group.get("params")
    if isinstance(params, Tensor | set) or not isinstance(params, Iterable):
        return
    group["params"] = params = list(params)
    names = group.get("param_names")
    seen: set[int] = set()
    first = []
    for index, entry in enumerate(params):
        p = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        if id(p) not in seen:
            seen.add(id(p))
            first.append(index)
    if len(first) == len(params):
        return
    group["params"] = [params[index] for index in first]
    if isinstance(names, list) and len(names) == len(params):
        group["param_names"] = [names[index] for index in first]
    warn_user(
        "optimizer contains a parameter group with duplicate parameters; each is stepped once "
        "(model.parameters() yields tied weights once)"
    )


def check_parameters(optimizer: str, group: Mapping[str, Any], rounding: str, state_dtype: torch.dtype | None) -> None:
    """Check the tensors of a new param group.

    Raises:
        TypeError: A parameter of a type that has no gradient.
        ValueError: A parameter that cannot be written element by element, or of a type that the rounding or the state's
            type do not go with.
    """
    for index, p in enumerate(group["params"]):
        wide = p.dtype in (torch.float64, torch.complex128)
        if rounding == "stochastic" and (p.dtype == torch.float16 or (wide and state_dtype == torch.bfloat16)):
            raise ValueError(
                f"{optimizer}: rounding='stochastic' with parameter {index} of the group in {p.dtype}; it rounds "
                "float32 math to bfloat16; valid here: nearest, kahan"
            )
        if p.is_complex() and state_dtype == torch.bfloat16:
            raise ValueError(
                f"{optimizer}: state_dtype=bfloat16 with parameter {index} of the group in {p.dtype}, for which there "
                "is no complex type; valid here: None, float32, float64"
            )
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(
                f"{optimizer}: parameter {index} of the group has dtype {p.dtype}; valid: floating-point or complex"
            )
        if (problem := problem_of_weight(p)) is not None:
            raise ValueError(f"{optimizer}: parameter {index} of the group cannot be stepped: {problem}")


def parse_dtype(name: str, value: str | torch.dtype | None) -> torch.dtype | None:
    """The storage type of the state, from its name.

    Raises:
        ValueError: Not one of the storage types.
    """
    valid = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
    if value is None or value in valid.values():
        return value  # type: ignore[return-value] # a dtype of `valid`
    key = str(value).removeprefix("torch.")
    if key not in valid:
        raise ValueError(f"{name}={value!r}; valid: None, {', '.join(valid)}")
    return valid[key]
