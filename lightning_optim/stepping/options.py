"""Checks of an optimizer's options: every error names the value and what would be valid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_optim.stepping.tensors import problem_of_weight
from lightning_optim.warnings import warn_user

_Check = tuple[Callable[[float], bool], str]
_NONNEGATIVE: _Check = (lambda x: 0 <= x < math.inf, "a finite number >= 0")
_FRACTION: _Check = (lambda x: 0 <= x < 1, "a number in [0, 1)")
_POSITIVE: _Check = (lambda x: x > 0, "a number > 0")
_COUNT: _Check = (lambda x: 1 <= x < 100 and x % 1 == 0, "a number of steps from 1 to 99")
_FINITE: _Check = (math.isfinite, "a finite number")

#: Valid ranges by option name: the same name means the same thing in every optimizer.
RANGES: dict[str, _Check] = {
    "lr": _NONNEGATIVE,
    "adamw_lr": _NONNEGATIVE,
    "betas": _FRACTION,
    "eps": _NONNEGATIVE,
    "weight_decay": _NONNEGATIVE,
    "momentum": _NONNEGATIVE,
    "dampening": _FINITE,
    "ns_steps": _COUNT,
    "max_weight_norm": _POSITIVE,
    "max_trust_ratio": _POSITIVE,
    "max_grad_norm": _POSITIVE,
}

#: Numbers that may also be None: no bound.
OPTIONAL = frozenset({"max_weight_norm", "max_trust_ratio"})

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
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise TypeError(f"{optimizer}: {name}={value!r} is not a bool; valid: True, False")
    elif name == "betas":
        if not isinstance(value, (tuple, list)) or len(value) != len(default):
            raise ValueError(f"{optimizer}: betas={value!r}; valid: {len(default)} numbers in [0, 1)")
        for index, beta in enumerate(value):
            _check_number(optimizer, f"betas[{index}]", beta, RANGES["betas"])
    elif value is None and name in OPTIONAL:
        return
    elif name in CHOICES:
        if not isinstance(value, str) or value not in CHOICES[name]:
            raise ValueError(f"{optimizer}: {name}={value!r}; valid: {', '.join(CHOICES[name])}")
    elif name in RANGES or isinstance(default, Real):
        _check_number(optimizer, name, value, RANGES.get(name, _FINITE))


def _check_number(optimizer: str, name: str, value: Any, check: _Check) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{optimizer}: {name} has shape {tuple(value.shape)}; valid: a number or a 0-dim tensor")
        if value.device.type == "meta" or value.layout != torch.strided or not _is_real(value):
            raise TypeError(
                f"{optimizer}: {name} is a tensor of {value.dtype} and layout {value.layout} on {value.device}; "
                f"valid: a dense tensor of a real type, or {check[1]}"
            )
        if value.device.type != "cpu":
            return  # reading it would wait for the device
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{optimizer}: {name}={value!r} is a {type(value).__name__}; valid: {check[1]}")
    try:
        number = float(value)
    except OverflowError as error:  # which no engine could compute with, also where any bound is valid
        raise ValueError(f"{optimizer}: {name} is an integer of hundreds of digits; valid: {check[1]}") from error
    if not check[0](number):
        raise ValueError(f"{optimizer}: {name}={value!r}; valid: {check[1]}")


def _is_real(value: Tensor) -> bool:
    return not (value.is_complex() or value.is_quantized or value.dtype == torch.bool)


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
