"""The judge of the other tests."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_optim.registry import OPTIMIZERS

from .common import Judge


def test_the_judge_notices_one_wrong_rounding() -> None:
    # A test that cannot fail is no test: one bfloat16 step, or 64 float32 roundings, are noticed.
    for dtype, change in ((torch.bfloat16, 2.0**-8), (torch.float32, 2.0**-18), (torch.float64, 2.0**-47)):
        p = nn.Parameter(torch.linspace(1.0, 1.9, 9).to(dtype))
        p.grad = torch.ones_like(p)
        optimizer = OPTIMIZERS["adamw"].create([p], lr=0.02, engine="eager")
        judge = Judge("adamw", optimizer)
        judge.before()
        optimizer.step()
        judge.after()
        with torch.no_grad():
            p[3] += change * p[3]
        with pytest.raises(AssertionError, match="is not in"):
            judge.after()
