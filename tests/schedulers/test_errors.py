"""Bad options are refused, by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_optim.schedulers import WSD, Cosine, Schedule

from .common import SCHEDULES, Make, sgd


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"warmup_steps": -1},
            ValueError,
            r": warmup_steps=-1; valid: .* steps >= 0, or a float in \[0, 1\)",
        ),
        ({"warmup_steps": -0.1}, ValueError, r"warmup_steps=-0.1; valid: .* float in \[0, 1\)"),
        ({"warmup_steps": 100.0}, ValueError, r"warmup_steps=100.0; valid: a whole number .* \(100 for 100 steps\)"),
        ({"warmup_steps": 1.0}, ValueError, r"warmup_steps=1.0; valid: a whole .* \(1 for 1 steps\)"),
        ({"warmup_steps": math.nan}, ValueError, "warmup_steps=nan; valid: a whole"),
        ({"warmup_steps": math.inf}, ValueError, "warmup_steps=inf; valid: a whole"),
        ({"warmup_steps": "10"}, TypeError, "warmup_steps='10' is a str; valid: a whole number"),
        ({"warmup_steps": True}, TypeError, "warmup_steps=True is a bool; valid: a whole number"),
        ({"min_lr_ratio": 1.5}, ValueError, r"min_lr_ratio=1.5; valid: a number in \[0, 1\]"),
        ({"min_lr_ratio": -0.1}, ValueError, "min_lr_ratio=-0.1; valid: a number in"),
        ({"min_lr_ratio": math.nan}, ValueError, "min_lr_ratio=nan; valid: a number in"),
        ({"min_lr_ratio": "0"}, TypeError, "min_lr_ratio='0' is a str; valid: a number in"),
        ({"warmup_start": 2.0}, ValueError, "warmup_start=2.0; valid: a number in"),
        ({"total_steps": 0}, ValueError, "total_steps=0; valid: a whole number >= 1"),
        ({"total_steps": -1}, ValueError, "total_steps=-1; valid: a whole number >= 1"),
        ({"total_steps": 10.0}, TypeError, "total_steps=10.0 is a float; valid: a whole number >= 1"),
        ({"total_steps": math.inf}, TypeError, "total_steps=inf is a float; valid: a whole number >= 1"),
        ({"warmup_steps": 11, "total_steps": 10}, ValueError, "warmup_steps=11"),
    ],
)
def test_bad_options(make: Make, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(sgd(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "exp"}, "WSD: decay='exp'; valid: 1-sqrt, linear, cosine"),
        ({"decay_steps": 1.5}, "decay_steps=1.5; valid: a whole"),
        ({"warmup_steps": 0.6, "decay_steps": 0.5}, "must not exceed 1 together"),
        (
            {"warmup_steps": 6, "decay_steps": 5, "total_steps": 10},
            r"warmup_steps=6 \+ decay_steps=5 must not exceed total_steps=10",
        ),
    ],
)
def test_bad_options_of_wsd(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WSD(sgd(), **options)


def test_only_optimizers_are_scheduled_and_the_base_is_abstract() -> None:
    with pytest.raises(TypeError, match=r"Cosine schedules a torch.optim.Optimizer, not Linear"):
        Cosine(torch.nn.Linear(1, 1), 0, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="abstract"):
        Schedule(sgd(), warmup_steps=0, total_steps=1, min_lr_ratio=0, warmup_start=None, last_epoch=-1)  # type: ignore[abstract]
