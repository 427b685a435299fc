"""Checks of an optimizer's options: every error names the value and what would be valid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_optim.checks import (
    FINITE,
    FRACTION,
    NONNEGATIVE,
    POSITIVE,
    Range,
    check_choice,
    check_number,
    check_numbers,
    check_switch,
    whole,
)
from lightning_optim.engines.base import math_dtype
from lightning_optim.rules.rule import UPDATES
from lightning_optim.stepping.tensors import problem_of_weight
from lightning_optim.warnings import warn_user

#: Switches of torch's own optimizers, and what to use in place of True. None and False ask for nothing.
TORCH_SWITCHES: dict[str, str] = {
    "foreach": "engine='foreach', or 'auto', which takes the fastest engine",
    "fused": "engine='auto', which takes the fastest engine, a fused one if there is one",
    "capturable": "capture_steps(), which records steps as a CUDA graph",
    "differentiable": "torch.optim's own class, as engines step without autograd",
}

#: Valid ranges of the options that mean the same in every optimizer that has them.
RANGES: Mapping[str, Range] = {
    "lr": NONNEGATIVE,
    "betas": FRACTION,
    "eps": NONNEGATIVE,
    "weight_decay": NONNEGATIVE,
    "momentum": NONNEGATIVE,
    "max_grad_norm": POSITIVE,
    UPDATES: whole(0),
}


@dataclass(frozen=True)
class Declared:
    """The valid values of a class's options, as it declares them.

    Attributes:
        ranges: The ranges of numbers, and of each number in a tuple. A number without a range may be any finite one.
        choices: The valid words of options that are words.
    """

    ranges: Mapping[str, Range] = field(default_factory=lambda: RANGES)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, optimizer: type) -> Declared:
        """The ``ranges`` and ``choices`` that a class and its bases declare."""
        ranges, choices = dict(RANGES), dict[str, tuple[str, ...]]()
        for base in reversed(optimizer.__mro__):
            ranges |= base.__dict__.get("ranges", {})
            choices |= base.__dict__.get("choices", {})
        return cls(ranges, choices)


#: What holds for classes that declare nothing.
UNDECLARED = Declared()

#: Options of all classes, by which one optimizer's saved groups are told from another's.
_KNOWN: set[str] = {"max_grad_norm"}

#: Options whose names are also keys that widely used wrappers and trainers put into param groups.
KNOWN_STRANGERS = frozenset({"beta", "rho", "adaptive", "d", "d0", "k", "r", "weight_lr_power", "train_mode"})


#: Options that do not tell optimizers apart: torch's AdamW saves its form of decay, though it has no such option.
_OF_SEVERAL = frozenset({"decoupled_weight_decay"})


def make_known(options: Iterable[str]) -> None:
    """Register options as some optimizer's, so that other optimizers refuse them in a group or a state."""
    _KNOWN.update(set(options) - KNOWN_STRANGERS - _OF_SEVERAL - TORCH_SWITCHES.keys())


def known_options() -> frozenset[str]:
    """The options that :func:`make_known` has registered, for all optimizers together."""
    return frozenset(_KNOWN)


def check_option(optimizer: str, name: str, value: Any, default: Any, declared: Declared = UNDECLARED) -> None:
    """Check one option of a param group.

    Args:
        optimizer: The optimizer's name, for the message.
        name: The option's name.
        value: Its value.
        default: The optimizer's default, whose type (bool, number or tuple of numbers) the value must have.
        declared: What the optimizer's class declares.

    Raises:
        ValueError: A value out of its range.
        TypeError: A value of another type.
    """
    valid = declared.ranges.get(name, FINITE)
    if isinstance(default, bool):
        check_switch(optimizer, name, value)
    elif isinstance(default, tuple | list):
        check_numbers(optimizer, name, value, valid, len(default), tensors=True)
    elif name in declared.choices:
        check_choice(optimizer, name, value, declared.choices[name])
    elif name in declared.ranges or isinstance(default, Real):
        check_number(optimizer, name, value, valid, tensors=True)


def check_options(
    optimizer: str, group: Mapping[str, Any], defaults: Mapping[str, Any], declared: Declared = UNDECLARED
) -> None:
    """Check all options that a param group sets.

    Raises:
        ValueError: An option out of its range.
        TypeError: An option of the wrong type.
    """
    for name, default in defaults.items():
        if name in group:
            check_option(optimizer, name, group[name], default, declared)


def each_once(group: dict[str, Any]) -> None:
    """Remove duplicate parameters from a param group, with a warning like torch's.

    Values that torch refuses (a set, say) are left for torch to refuse.
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


@dataclass(frozen=True)
class Need:
    """What a rule needs of every parameter.

    Attributes:
        holds: Whether a parameter meets the need.
        words: What is valid, in words.
    """

    holds: Callable[[Tensor], bool]
    words: str


#: For rules that have no meaning for complex numbers.
REAL = Need(lambda p: not p.is_complex(), "real weights")


def check_parameters(
    optimizer: str,
    group: Mapping[str, Any],
    rounding: str,
    state_dtype: torch.dtype | None,
    needs: Sequence[Need] = (),
) -> None:
    """Check the tensors of a new param group.

    Args:
        optimizer: The optimizer's name.
        group: The group.
        rounding: How low-precision weights are written.
        state_dtype: The storage type of the state.
        needs: What the optimizer needs of each parameter.

    Raises:
        TypeError: A parameter of a type that has no gradient.
        ValueError: A parameter that cannot be written element by element, whose type does not go with the rounding or
            the state's type, or that does not meet a need of the optimizer.
    """
    for index, p in enumerate(group["params"]):
        wide = math_dtype(p.dtype) == torch.float64
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
        for need in needs:
            if not need.holds(p):
                names = group.get("param_names")
                which = f"parameter {index} of the group" + (f", {names[index]!r}," if names else "")
                raise ValueError(
                    f"{optimizer}: {which} has shape {tuple(p.shape)} and {p.dtype}, for which there is no "
                    f"{optimizer}; valid: {need.words}"
                )


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
