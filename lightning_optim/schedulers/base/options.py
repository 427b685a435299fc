"""Checks of the options that schedules have in common, for constructor arguments and for loaded states."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

from torch import Tensor

from lightning_optim.checks import (
    FINITE,
    FRACTION,
    SHARE,
    WHOLE,
    Range,
    WrongTypeError,
    check_choice,
    check_number,
    shown,
    whole,
)
from lightning_optim.primitives import primitive
from lightning_optim.schedulers.base.group_rates import Rate, plain

#: ``check(schedule, option, value)`` checks an option and returns it as a value that a checkpoint can hold.
Check = Callable[[str, str, Any], Any]

_STEPS = whole(0)
_EITHER = "a whole number of steps >= 0, or a float in [0, 1) for that fraction of total_steps"


def check_steps(who: str, name: str, value: int | float) -> int | float:
    """Check an amount of steps: a count (an int), or a fraction of the run (a float).

    Returns:
        A plain ``int`` or ``float``, so that no NumPy scalar reaches a checkpoint.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` is a negative count, or a float outside of [0, 1).
    """
    value = primitive(value)
    if isinstance(value, Integral):
        return check_number(who, name, value, _STEPS.described(_EITHER))
    counted = isinstance(value, float) and value >= 1 and value.is_integer()
    meant = f" ({int(value)} for {int(value)} steps)" if counted else ""
    return check_number(who, name, value, FRACTION.described(_EITHER + meant))


def check_ratio(who: str, name: str, value: float) -> float:
    """Check a ratio from 0 to 1 and return it as a plain ``float``."""
    return float(check_number(who, name, value, SHARE))


def a_number(valid: Range) -> Check:
    """A check for the numbers of a range, such as ``whole(1)``."""
    return lambda who, name, value: check_number(who, name, value, valid)


def one_of(*choices: str) -> Check:
    """A check for one of a few words."""
    return lambda who, name, value: check_choice(who, name, value, choices)


#: ``total_steps``: how often ``step()`` is called in the whole run.
check_total: Check = a_number(whole(1))

#: ``last_epoch`` in a loaded state: it is below 0 while a schedule waits for its turn in a ``SequentialLR``.
check_position: Check = a_number(WHOLE)


def check_rates(who: str, name: str, value: list[Rate]) -> list[Rate]:
    """Check the learning rates of a loaded state, one for each param group."""
    valid = "valid: a list of learning rates, one for each param group"
    if not isinstance(value, list | tuple):
        raise WrongTypeError(f"{who}: {name}={shown(value)} is a {type(value).__name__}; {valid}")
    for index, rate in enumerate(value):
        if not (isinstance(rate, Tensor) and rate.numel() == 1):
            check_number(who, f"{name}[{index}]", rate, FINITE)
    return [plain(rate) for rate in value]


def optional(check: Check) -> Check:
    """A check that lets None through."""
    return lambda who, name, value: None if value is None else check(who, name, value)
