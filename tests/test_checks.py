"""The one place where numbers, switches and words are checked, and who goes there."""

from __future__ import annotations

import ast
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lightning_optim
from lightning_optim import LBFGS, SAM, SGD, AdamW, Cosine
from lightning_optim.checks import (
    FRACTION,
    NONNEGATIVE,
    POSITIVE,
    POSITIVE_OR_NONE,
    WrongTypeError,
    above,
    check_choice,
    check_number,
    check_numbers,
    check_switch,
    whole,
)
from lightning_optim.control.rollback.policy import UndoPolicy
from lightning_optim.offload import DetachedOptions
from lightning_optim.param_groups import param_groups
from lightning_optim.placement.needs import Conditions

PACKAGE = Path(lightning_optim.__file__).parent
HUGE = 10**400
#: More digits than Python prints.
ENDLESS = 10**5000


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1), (0.5, 0.5), (np.float32(0.5), 0.5), (np.int64(3), 3), (np.array(0.25), 0.25), (Fraction(1, 4), 0.25)],
)
def test_numbers_become_pythons_own(value: Any, expected: float) -> None:
    checked = check_number("X", "x", value, NONNEGATIVE)
    assert checked == expected
    assert type(checked) is type(expected)


@pytest.mark.parametrize(
    ("value", "valid", "words"),
    [
        (-1, NONNEGATIVE, "X: x=-1; valid: a finite number >= 0"),
        (float("nan"), POSITIVE, "X: x=nan; valid: a number > 0"),
        (HUGE, NONNEGATIVE, "X: x=an integer of 401 digits; valid: a finite number >= 0"),
        (HUGE, POSITIVE, "X: x=an integer of 401 digits; valid: a number > 0"),
        pytest.param(-ENDLESS, whole(0), "X: x=an integer of 5001 digits; valid: a whole number >= 0", id="endless"),
        (1, FRACTION, "X: x=1; valid: a number in [0, 1)"),
        (1.0, above(1), "X: x=1.0; valid: a finite number > 1"),
        (100, whole(1, 99), "X: x=100; valid: a whole number from 1 to 99"),
        (0.0, POSITIVE_OR_NONE, "X: x=0.0; valid: a number > 0, None"),
    ],
)
def test_numbers_out_of_range(value: Any, valid: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 # all of it is compared
        check_number("X", "x", value, valid)
    assert str(caught.value) == words
    assert not isinstance(caught.value, TypeError)


@pytest.mark.parametrize("value", [True, np.bool_(True), "1", None, [1], 1j, torch.tensor(1.0)])
def test_what_is_no_number(value: Any) -> None:
    """For whoever catches either of the two errors that a value can have."""
    with pytest.raises(WrongTypeError, match=r"^x=.* is a \w+; valid: a finite number >= 0$") as caught:
        check_number("", "x", value, NONNEGATIVE)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)


def test_whole_numbers_are_integers() -> None:
    with pytest.raises(WrongTypeError, match=r"x=2\.0 is a float; valid: a whole number >= 1"):
        check_number("", "x", 2.0, whole(1))


def test_tensors_are_numbers_where_they_may_be() -> None:
    rate = torch.tensor(0.1)
    assert check_number("X", "lr", rate, NONNEGATIVE, tensors=True) is rate
    for wrong, error, words in (
        (torch.ones(2), ValueError, r"X: lr has shape \(2,\); valid: a number or a 0-dim tensor"),
        (torch.tensor(True), TypeError, "lr is a tensor of torch.bool"),
        (torch.tensor(1.0, device="meta"), TypeError, "on meta; valid: a dense tensor of a real type, or a finite"),
        (torch.tensor(-1.0), ValueError, r"lr=-1\.0; valid: a finite number >= 0"),
    ):
        with pytest.raises(error, match=words):
            check_number("X", "lr", wrong, NONNEGATIVE, tensors=True)


def test_several_numbers() -> None:
    check_numbers("X", "betas", [0.9, 0.99], FRACTION, 2)
    for wrong in (0.9, (0.9,), "ab", (0.9, 0.9, 0.9)):
        with pytest.raises(ValueError, match=r"X: betas=.*; valid: 2 numbers in \[0, 1\)"):
            check_numbers("X", "betas", wrong, FRACTION, 2)
    with pytest.raises(ValueError, match=r"X: betas\[1\]=1; valid: a number in \[0, 1\)"):
        check_numbers("X", "betas", (0.9, 1), FRACTION, 2)
    with pytest.raises(ValueError, match="betas=a tuple; valid: 3 numbers"):
        check_numbers("X", "betas", (ENDLESS, 1), FRACTION, 3)


def test_switches_and_words() -> None:
    assert check_switch("X", "on", np.bool_(True)) is True
    assert check_choice("X", "how", "a", ("a", "b")) == "a"
    for wrong in (1, "yes", None):
        with pytest.raises(TypeError, match=r"X: on=.* is not a bool; valid: True, False"):
            check_switch("X", "on", wrong)
    for word in ("A", None, ["a"], torch.ones(2)):
        with pytest.raises(ValueError, match=r"X: how=.*; valid: a, b"):
            check_choice("X", "how", word, ("a", "b"))


def _weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


def _loaded(optimizer: Any, **options: Any) -> None:
    state = optimizer.state_dict()
    state["param_groups"][0].update(options)
    optimizer.load_state_dict(state)


@pytest.mark.parametrize("number", [HUGE, ENDLESS], ids=["huge", "endless"])
@pytest.mark.parametrize(
    ("what", "option"),
    [
        (lambda x: AdamW(_weights(), lr=x), "lr"),
        (lambda x: AdamW(_weights(), betas=(0.9, x)), r"betas\[1\]"),
        (lambda x: AdamW(_weights(), max_grad_norm=x), "max_grad_norm"),
        (lambda x: _loaded(AdamW(_weights()), lr=x), "lr"),
        (lambda x: SAM(_weights(), SGD, rho=x), "rho"),
        (lambda x: SAM([{"params": _weights(), "sam_rho": x}], SGD), "sam_rho"),
        (lambda x: _loaded(SAM(_weights(), SGD), sam_rho=x), "sam_rho"),
        (lambda x: LBFGS(_weights(), history_size=x), "history_size"),
        (lambda x: LBFGS(_weights(), tolerance_grad=x), "tolerance_grad"),
        (lambda x: LBFGS(_weights(), memory_budget=x), "memory_budget"),
        (lambda x: LBFGS(_weights(), noise=x), "noise"),
        (lambda x: Cosine(SGD(_weights()), total_steps=x), "total_steps"),
        (lambda x: Cosine(SGD(_weights()), warmup_steps=x), "warmup_steps"),
        (lambda x: UndoPolicy(threshold=x), "threshold"),
        (lambda x: UndoPolicy(window=x), "window"),
        (lambda x: DetachedOptions(bucket_mb=x), "bucket_mb"),
        (lambda x: param_groups(nn.Linear(2, 2), lr=x), "lr"),
        (lambda x: Conditions(resident_bytes=x), "resident_bytes"),
    ],
)
def test_integers_that_no_float_comes_near_to_are_refused(what: Callable[[Any], Any], option: str, number: int) -> None:
    with pytest.raises(ValueError, match=rf"(^|: ){option}=an integer of \d+ digits; valid: "):
        what(number)


def test_nobody_checks_numbers_elsewhere() -> None:
    """A check by hand forgets NaN, NumPy's numbers, bools or huge integers, and speaks its own dialect."""
    # Those that ask what a value is without saying that it is wrong, and the steps of a loaded state.
    allowed = {
        "checks.py",
        "primitives.py",
        "control/lr_finder/rates.py",
        "control/schedules/learning_rates.py",
        "schedulers/base/options.py",
        "stepping/loading.py",
        "stepping/options.py",
    }
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if name in allowed:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Call(func=ast.Name("isinstance"), args=[_, kind]) if {"Real", "Integral"} & {
                    getattr(part, "attr", getattr(part, "id", None)) for part in ast.walk(kind)
                }:
                    found.append(f"{name}:{node.lineno}")
    assert not found
