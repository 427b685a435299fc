"""Kahan summation keeps what rounding bfloat16 weights to nearest loses."""

from __future__ import annotations

from typing import Any

import pytest
import references
import torch
from torch import nn

from lightning_optim.registry import OPTIMIZERS
from lightning_optim.rules.policy import KAHAN_SLOT, Decay

from .common import ENGINE, OPTIMIZER, variant, wide

#: Options with which updates are about 1e-3, where that is not the learning rate.
SMALL: dict[str, dict[str, Any]] = {
    "muon": {"lr": 8e-3},  # an element of an orthogonal matrix of 4 x 64 is 1/8 in the mean
    "prodigy": {"lr": 0.1, "d_coef": 1e-3},  # times d, which stays what it was at first
    "radam": {"lr": 3e-3},  # the first ones are smaller
    "schedulefreeadamw": {"lr": 4e-3},  # the weight is nearer to the average of steps than to the last one
    "soap": {"lr": 8e-3},  # most of the gradient is along one eigenvector, whose elements are 1/8 in the mean
}


@pytest.mark.matrix(unless=lambda name, engine: references.representative(name) and engine == references.FASTEST)
@ENGINE
@OPTIMIZER
@pytest.mark.filterwarnings("ignore::lightning_optim.warnings.LightningOptimWarning")  # host passes some on
def test_kahan_bfloat16_stays_with_float32_where_nearest_stalls(name: str, engine: str) -> None:
    """200 updates of about 1e-3 of a weight each, a quarter of a bfloat16 step: rounded to nearest, they are lost."""
    random = torch.Generator().manual_seed(5)
    start = (torch.rand(4, 64, generator=random) + 1).to(torch.bfloat16)
    options: dict[str, Any] = {**references.BASE[name], "lr": 1e-3, "engine": engine}
    options |= SMALL.get(name, {})
    runs = {"kahan": torch.bfloat16, "nearest": torch.bfloat16, "float32": torch.float32}
    ends = {}
    for rounding, dtype in runs.items():
        p = nn.Parameter(start.to(dtype, copy=True))
        how = "nearest" if rounding == "float32" else rounding
        optimizer = OPTIMIZERS[name].create([p], **{**options, "rounding": how})
        random.manual_seed(6)
        for _ in range(200):
            p.grad = (torch.randn(p.shape, generator=random) * 0.5 + 1).to(torch.bfloat16).to(dtype)
            if name == "sgd":
                p.grad *= 0.125  # momentum multiplies it by up to 10
            optimizer.step()
        ends[rounding] = wide(p)
    moved = (ends["float32"] - start).abs().mean()
    errors = {rounding: (ends[rounding] - ends["float32"]).abs().mean() / moved for rounding in ("kahan", "nearest")}
    assert moved > 0.1
    # What is left of Kahan's error is the last rounding to bfloat16, 2^-9 relative at most; nearest loses most of
    # the way. Measured: .01 to .02 against .5 to 1.
    assert errors["kahan"] < 0.05, errors
    assert errors["nearest"] > 10 * errors["kahan"], errors


@ENGINE
@pytest.mark.parametrize("kind", ["decoupled", "proximal"])
def test_kahan_keeps_a_decay_below_float32s_rounding(kind: Decay, engine: str) -> None:
    """``p * (1 - lr * weight_decay)`` is ``p`` again in float32 where the product is 2^-26: it is not computed so."""
    p = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    optimizer = variant("sgd", kind)([p], lr=2.0**-13, weight_decay=2.0**-13, rounding="kahan", engine=engine)
    for count in range(1, 4):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert (p == 1).all()
        assert (optimizer.state[p][KAHAN_SLOT] == -count * 2.0**-26).all()
