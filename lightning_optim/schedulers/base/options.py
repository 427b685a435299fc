"""The options that schedules have in common: each is checked where it is given, and where it is loaded."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_optim.schedulers.base.group_rates import Rate, plain


def check_steps(name: str, value: int | float) -> int | float:
    """Validate an amount that is a count (int >= 0) or a fraction of the run (float in [0, 1)).

    Returns:
        A plain ``int`` or ``float``, so that NumPy scalars cannot reach a checkpoint.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` is a negative count, or a float outside [0, 1).
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} must be an int (steps) or a float in [0, 1) (fraction of total_steps)")
    if isinstance(value, numbers.Integral):
        if value < 0:
            raise ValueError(f"{name}={value} must be 0 or more steps, or a float in [0, 1)")
        return int(value)
    value = float(value)
    if not 0 <= value < 1:
        hint = f"{int(value)} for {int(value)} steps" if value >= 1 and value.is_integer() else "e.g. 100"
        raise ValueError(
            f"{name}={value} is neither a count nor a fraction: give an int ({hint}), "
            f"or a float in [0, 1) for that fraction of total_steps (e.g. 0.1)"
        )
    return value


def check_ratio(name: str, value: float) -> float:
    """Validate a ratio in [0, 1] and return it as a plain ``float``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} must be a float in [0, 1]")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must be in [0, 1]")
    return float(value)


def check_total(value: int) -> int:
    """Validate ``total_steps`` and return it as a plain ``int``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"total_steps={value!r} must be an int: the number of step() calls in the whole run")
    if value < 1:
        raise ValueError(f"total_steps={value} must be at least 1")
    return int(value)


def check_position(name: str, value: int) -> int:
    """Validate a position of a loaded state, which is below 0 where a schedule waits for its turn."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r} must be an int: the number of step() calls made")
    return int(value)


def check_rates(name: str, value: list[Rate]) -> list[Rate]:
    """Validate the learning rates of a loaded state, one for each param group."""
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name}={value!r} must be a list of learning rates, one for each param group")
    for rate in value:
        if isinstance(rate, Tensor):
            single = rate.numel() == 1
        else:  # NumPy's arrays of no dimension among them
            single = not isinstance(rate, bool) and (isinstance(rate, numbers.Real) or getattr(rate, "ndim", None) == 0)
        if not single:
            raise TypeError(f"{name}={value!r} must be a list of learning rates, but {rate!r} is no number")
    return [plain(rate) for rate in value]


def optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A check that lets None through."""
    return lambda value: None if value is None else check(value)
