"""The learning rates themselves, against closed forms and torch's schedulers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
)

from lightning_optim.schedulers import WSD, Cosine, Linear

from .common import SCHEDULES, Make, lrs_of, sgd


def expected(kind: str, t: int, warmup: int, total: int, floor: float, start: float | None) -> float:
    """The definitions of the documentation, written for one value at a time."""
    W, T = warmup, total
    if t < W:
        return (t + 1) / (W + 1) if start is None else start + (1 - start) * t / W
    if t >= T:
        return floor
    x = (t - W) / (T - W)
    if kind == "linear":
        return (1 - floor) * (1 - x) + floor
    if kind == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * x)) / 2
    begin = T - round(0.2 * T)
    return 1.0 if t < begin else floor + (1 - floor) * (1 - ((t - begin) / (T - begin)) ** 0.5)


@pytest.mark.parametrize(("kind", "make"), [("linear", Linear), ("cosine", Cosine), ("wsd", WSD)])
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("start", [None, 0.0, 0.25])
def test_values(kind: str, make: Make, warmup: int, floor: float, start: float | None) -> None:
    schedule = make(sgd(3.0), warmup, 30, min_lr_ratio=floor, warmup_start=start)
    want = [3.0 * expected(kind, t, warmup, 30, floor, start) for t in range(40)]
    assert lrs_of(schedule, 40) == pytest.approx(want, abs=1e-15)


def test_linear_equals_the_formula_of_hugging_face() -> None:
    W, T = 5, 20

    def hugging_face(t: int) -> float:
        return t / max(1, W) if t < W else max(0.0, (T - t) / max(1, T - W))

    ours = lrs_of(Linear(sgd(0.3), W, T, warmup_start=0.0), T + 3)
    assert ours == pytest.approx(lrs_of(LambdaLR(sgd(0.3), hugging_face), T + 3), abs=1e-16)


def test_cosine_equals_torch_until_the_end() -> None:
    T = 25
    ours = lrs_of(Cosine(sgd(0.3), total_steps=T, min_lr_ratio=0.1), T + 1)
    theirs = lrs_of(CosineAnnealingLR(sgd(0.3), T_max=T, eta_min=0.03), T + 1)
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_warmup_start_equals_torch_linear_lr() -> None:
    ours = lrs_of(WSD(sgd(0.3), 8, 20, decay_steps=0, warmup_start=0.25), 15)
    theirs = lrs_of(LinearLR(sgd(0.3), start_factor=0.25, total_iters=8), 15)
    assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize(
    ("decay", "shape"),
    [
        ("1-sqrt", lambda x: 1 - x**0.5),
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
    ],
)
@pytest.mark.parametrize("decay_steps", [8, 0.4])
def test_wsd_decay(decay: Any, shape: Callable[[float], float], decay_steps: int | float) -> None:
    got = lrs_of(WSD(sgd(), 2, 20, decay_steps=decay_steps, decay=decay), 22)
    assert got[:2] == pytest.approx([1 / 3, 2 / 3])
    assert got[2:13] == [1.0] * 11
    assert got[12:20] == pytest.approx([shape(k / 8) for k in range(8)])
    assert got[20:] == [0.0, 0.0]


@pytest.mark.parametrize("make", SCHEDULES)
def test_extremes_stay_in_range_and_never_rise_after_the_warmup(make: Make) -> None:
    for W, T, floor in itertools.product((0, 1, 4, 10), (10, 11, 37), (0.0, 0.3)):
        schedule = make(sgd(), W, T, min_lr_ratio=floor)
        factors = [schedule.factor(t) for t in range(-2, T + 50)]
        assert all(0 <= f <= 1 for f in factors), (W, T, factors)
        after = factors[2 + W :]
        assert after == sorted(after, reverse=True)
        assert after[T - W :] == [floor] * 50


@pytest.mark.parametrize("make", SCHEDULES)
def test_fraction_is_of_the_total(make: Make) -> None:
    assert lrs_of(make(sgd(), 0.1, 70), 75) == lrs_of(make(sgd(), 7, 70), 75)


def test_two_rounded_fractions_may_meet() -> None:
    # 0.5 of 3 rounds to 2 for both; the warmup goes first and the decay has the rest.
    assert lrs_of(WSD(sgd(), 0.5, 3, decay_steps=0.5), 4) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.0])
