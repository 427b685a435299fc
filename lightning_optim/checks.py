"""Checks of options: every number, switch and word that users give is checked here, with errors of one form.

An error says who was given what, and what would be valid: ``AdamW: lr=-1.0; valid: a finite number >= 0``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from lightning_optim.primitives import primitive

#: A value that is longer in print is abridged in errors.
_MOST_LETTERS = 200


class WrongTypeError(TypeError, ValueError):
    """A value of another type than the valid ones: both a TypeError and a ValueError, so callers may catch either."""


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have.

    Attributes:
        holds: Whether a number, as a float, is valid. No NaN is valid.
        words: The same for people: what follows ``valid:`` in an error.
        whole: Whether only integers are valid, and not a float such as 2.0.
        none: Whether None is valid as well.
    """

    holds: Callable[[float], bool]
    words: str
    whole: bool = False
    none: bool = False

    def or_none(self) -> Range:
        """The same numbers, or None."""
        return Range(self.holds, f"{self.words}, None", self.whole, none=True)

    def described(self, words: str) -> Range:
        """The same numbers in other words."""
        return Range(self.holds, words, self.whole, self.none)


FINITE = Range(math.isfinite, "a finite number")
NONNEGATIVE = Range(lambda x: 0 <= x < math.inf, "a finite number >= 0")
#: Infinity is valid too: as a bound, it bounds nothing.
POSITIVE = Range(lambda x: x > 0, "a number > 0")
POSITIVE_FINITE = Range(lambda x: 0 < x < math.inf, "a finite number > 0")
POSITIVE_OR_NONE = POSITIVE.or_none()
#: Decay rates of averages, for example: with 1 an average would never move.
FRACTION = Range(lambda x: 0 <= x < 1, "a number in [0, 1)")
#: Shares of a whole.
SHARE = Range(lambda x: 0 <= x <= 1, "a number in [0, 1]")
WHOLE = Range(math.isfinite, "a whole number", whole=True)


def whole(least: int, most: int | None = None) -> Range:
    """The integers from one number to another, or from one number on.

    >>> whole(1).words, whole(1, 99).words
    ('a whole number >= 1', 'a whole number from 1 to 99')
    """
    words = f"a whole number >= {least}" if most is None else f"a whole number from {least} to {most}"
    return Range(lambda x: least <= x <= (math.inf if most is None else most), words, whole=True)


def above(least: float, below: float = math.inf) -> Range:
    """The finite numbers above one bound and below another, neither of them included.

    >>> above(1).words, above(0, 1).words
    ('a finite number > 1', 'a number in (0, 1)')
    """
    words = f"a finite number > {least:g}" if below == math.inf else f"a number in ({least:g}, {below:g})"
    return Range(lambda x: least < x < below, words)


def check_number(who: str, name: str, value: Any, valid: Range, *, tensors: bool = False) -> Any:
    """Check a number, and make it one that any checkpoint can hold.

    Args:
        who: Whose option it is, for the error: a class, or a function. Empty: nobody is named.
        name: The option's name.
        value: What was given: Python's own number or NumPy's.
        valid: The numbers that are valid.
        tensors: Whether a tensor of one element is valid too. On another device than the CPU it is not read, as that
            would wait for the device.

    Returns:
        The number as Python's own ``int`` or ``float``; None or a tensor as it is.

    Raises:
        ValueError: A number out of the range, or an integer that is too large for a float.
        WrongTypeError: The value is not a number.

    >>> check_number("Lion", "lr", 1e-4, NONNEGATIVE)
    0.0001
    >>> check_number("Lion", "lr", "fast", NONNEGATIVE)
    Traceback (most recent call last):
        ...
    lightning_optim.checks.WrongTypeError: Lion: lr='fast' is a str; valid: a finite number >= 0
    """
    value = primitive(value)
    if value is None and valid.none:
        return None
    number = value
    if tensors and isinstance(value, Tensor):
        _check_tensor(who, name, value, valid)
        if value.device.type != "cpu":
            return value
        number = value.item()
    if isinstance(number, bool) or not isinstance(number, Integral if valid.whole else Real):
        raise WrongTypeError(f"{_named(who, name, number)} is a {type(number).__name__}; valid: {valid.words}")
    try:
        fits = valid.holds(float(number))
    except OverflowError:  # no engine could compute with such an integer, even if any bound is valid
        fits = False
    if not fits:
        raise ValueError(f"{_named(who, name, number)}; valid: {valid.words}")
    return value


def check_numbers(who: str, name: str, values: Any, valid: Range, count: int, *, tensors: bool = False) -> None:
    """Check a tuple or list of ``count`` numbers, such as ``betas``.

    Raises:
        ValueError: It has another length, or a number is out of the range.
        WrongTypeError: One of its values is not a number.
    """
    if not isinstance(values, tuple | list) or len(values) != count:
        plural = valid.words.removeprefix("a ").replace("number", "numbers", 1)
        raise ValueError(f"{_named(who, name, values)}; valid: {count} {plural}")
    for index, value in enumerate(values):
        check_number(who, f"{name}[{index}]", value, valid, tensors=tensors)


def check_switch(who: str, name: str, value: Any) -> bool:
    """Check a switch: True or False, and neither 1 nor "yes".

    Raises:
        WrongTypeError: The value is not a bool.
    """
    value = primitive(value)
    if not isinstance(value, bool):
        raise WrongTypeError(f"{_named(who, name, value)} is not a bool; valid: True, False")
    return value


def check_choice(who: str, name: str, value: Any, choices: Iterable[Any], *, hint: str = "") -> Any:
    """Check that a value is one of a few, usually words.

    Args:
        who: Whose option it is.
        name: Its name.
        value: What was given.
        choices: What is valid.
        hint: More text for the error, such as that of :func:`~lightning_optim.hints.did_you_mean`.

    Raises:
        ValueError: Another value.
    """
    choices = tuple(choices)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{_named(who, name, value)}{hint}; valid: {', '.join(map(str, choices))}")
    return value


def check_ranges(who: str, options: Any, ranges: Mapping[str, Range]) -> None:
    """Check attributes of a dataclass of options, by name.

    Raises:
        ValueError, WrongTypeError: As :func:`check_number`.
    """
    for name, valid in ranges.items():
        check_number(who, name, getattr(options, name), valid)


def shown(value: Any) -> str:
    """A value as an error shows it: abridged, if it is long.

    >>> shown(0.1), shown(10**400)
    ('0.1', 'an integer of 401 digits')
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**_MOST_LETTERS:
        # Python itself refuses to print an integer of some thousand digits.
        return f"an integer of {_digits(value)} digits"
    try:
        text = repr(value)
    except ValueError:  # such an integer in a list, say
        return f"a {type(value).__name__}"
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 4]} ..."


def _digits(value: int) -> int:
    least = int(abs(value).bit_length() * math.log10(2))
    return least + (abs(value) >= 10**least)


def _named(who: str, name: str, value: Any) -> str:
    return f"{who}: {name}={shown(value)}" if who else f"{name}={shown(value)}"


def _check_tensor(who: str, name: str, value: Tensor, valid: Range) -> None:
    start = f"{who}: {name}" if who else name
    if value.numel() != 1:
        raise ValueError(f"{start} has shape {tuple(value.shape)}; valid: a number or a 0-dim tensor")
    unreal = value.is_complex() or value.is_quantized or value.dtype == torch.bool
    if value.device.type == "meta" or value.layout != torch.strided or unreal:
        raise WrongTypeError(
            f"{start} is a tensor of {value.dtype} and layout {value.layout} on {value.device}; "
            f"valid: a dense tensor of a real type, or {valid.words}"
        )
