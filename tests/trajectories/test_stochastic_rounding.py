"""Stochastic rounding is unbiased, the same on all engines, and goes on after a reload."""

from __future__ import annotations

import math
from typing import Any

import pytest
import references
import torch
from torch import Tensor, nn

from lightning_optim.optimizers import RuleOptimizer, SGDOptim
from lightning_optim.registry import OPTIMIZERS

from .common import ENGINE, OPTIMIZER, ROUNDINGS, bits, reloaded, running_engines

#: Options with which float32 math is exact up to the rounding to bfloat16 whether or not an engine fuses multiply and
#: add: all products are by powers of two.
DYADIC: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 2.0**-8, "momentum": 0.5, "nesterov": True},
    "lion": {"lr": 2.0**-10, "betas": (0.75, 0.5)},
}


def stochastic_run(
    name: str, options: dict[str, Any], *, steps: int = 6, reload_at: int = 99, size: int = 20_000
) -> list[Tensor]:
    """Weights and state after some steps of bfloat16 weights with stochastic rounding."""
    random = torch.Generator().manual_seed(7)
    shapes = [(size // 8, 8), (33,), ()]
    params = [nn.Parameter(torch.randn(shape, generator=random).to(torch.bfloat16)) for shape in shapes]
    params.append(nn.Parameter(torch.randn(6, 5, generator=random).to(torch.bfloat16).t()))

    def make() -> RuleOptimizer:
        return OPTIMIZERS[name].create(params, rounding="stochastic", **options)

    optimizer = make()
    for step in range(steps):
        if step == reload_at:
            optimizer = reloaded(optimizer, make)
        for p in params:
            p.grad = torch.randn(p.shape, generator=random).to(torch.bfloat16)
        optimizer.step()
    slots = [value for p in params for key, value in sorted(optimizer.state[p].items()) if key != "step"]
    return [*(p.detach() for p in params), *slots]


@pytest.mark.parametrize("name", DYADIC)
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
def test_stochastic_rounding_is_the_same_on_all_engines_bit_for_bit(name: str, state_dtype: str | None) -> None:
    options = {**DYADIC[name], "state_dtype": state_dtype}
    expected = stochastic_run(name, {**options, "engine": "eager"})
    for engine in running_engines()[1:]:
        for a, b in zip(expected, stochastic_run(name, {**options, "engine": engine}), strict=True):
            assert torch.equal(bits(a), bits(b)), engine


@references.common_to_all
@OPTIMIZER
def test_stochastic_rounding_differs_only_with_the_float32_value_before_it(name: str) -> None:
    """One rounding of float32 more or less changes the outcome with a chance of 2^-16."""
    size = 20_000
    expected = stochastic_run(name, {**references.BASE[name], "engine": "eager"}, steps=1, size=size)
    mean = ROUNDINGS * size * 2.0**-16
    for engine in running_engines()[1:]:
        other = stochastic_run(name, {**references.BASE[name], "engine": engine}, steps=1, size=size)
        differing = int((bits(expected[0]) != bits(other[0])).sum())
        assert differing <= mean + 5 * math.sqrt(mean), engine


@references.common_to_all
@ENGINE
@OPTIMIZER
def test_stochastic_rounding_goes_on_after_a_reload(name: str, engine: str) -> None:
    options = {**references.BASE[name], "engine": engine, "state_dtype": "bfloat16"}
    once = stochastic_run(name, options, size=800)
    again = stochastic_run(name, options, size=800)
    through_a_file = stochastic_run(name, options, size=800, reload_at=3)
    for a, b, c in zip(once, again, through_a_file, strict=True):
        assert torch.equal(bits(a), bits(b))
        assert torch.equal(bits(a), bits(c))


@ENGINE
def test_stochastic_rounding_is_unbiased(engine: str) -> None:
    """Steps of an eighth of a bfloat16 step: nearest never moves, stochastic moves by the right mean."""
    count, steps = 10_000, 16
    unit = 2.0**-7  # of bfloat16 in [1, 2)
    params = [nn.Parameter(torch.full((count,), 1.5, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = SGDOptim(params, lr=1.0, rounding="stochastic", engine=engine)
    still = nn.Parameter(torch.full((count,), 1.5, dtype=torch.bfloat16))
    nearest = SGDOptim([still], lr=1.0, engine=engine)
    moves = []
    for _ in range(steps):
        before = [p.detach().clone() for p in params]
        for p in (*params, still):
            p.grad = torch.full_like(p, unit / 8)
        optimizer.step()
        nearest.step()
        moves.append(torch.stack([(b - p.detach()).double() / unit for b, p in zip(before, params, strict=True)]))
    assert (still == 1.5).all()
    moved = torch.stack(moves)  # steps, tensors, elements: 0 or 1 bfloat16 steps
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    # The noise is a fixed hash, so this cannot flake: 5 standard deviations of the mean of independent coin flips.
    deviation = math.sqrt(1 / 8 * 7 / 8 / moved.numel())
    assert abs(float(moved.mean()) - 1 / 8) < 5 * deviation
    # Independent between tensors, steps and neighbours: correlations of as many independent pairs are below 5/sqrt(n).
    centred = moved - 1 / 8
    variance = 1 / 8 * 7 / 8
    pairs = {
        "tensors": centred[:, 0] * centred[:, 1],
        "steps": centred[1:] * centred[:-1],
        "neighbours": centred[..., 1:] * centred[..., :-1],
    }
    for what, products in pairs.items():
        assert abs(float(products.mean())) / variance < 5 / math.sqrt(products.numel()), what


@ENGINE
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_stochastically_rounded_state_is_unbiased(name: str, engine: str) -> None:
    """A second moment whose increments are below half a bfloat16 step stalls when rounded to nearest."""
    count, steps = 4_000, 40
    ends = {}
    for rounding in ("stochastic", "nearest"):
        p = nn.Parameter(torch.zeros(count))
        options = {"betas": (0.9, 0.999), "rounding": rounding, "state_dtype": "bfloat16", "engine": engine}
        optimizer = OPTIMIZERS[name].create([p], lr=1e-3, **options)
        slot = "exp_avg_sq" if name == "adamw" else "exp_avg"
        p.grad = torch.ones(count)
        optimizer.step()
        optimizer.state[p][slot].fill_(0.5)
        for _ in range(steps):
            p.grad = torch.ones(count)
            optimizer.step()
        ends[rounding] = optimizer.state[p][slot].double()
    exact = 1 - 0.5 * 0.999**steps
    assert (ends["nearest"] == 0.5).all()
    # Each step adds a coin flip of one bfloat16 step (2^-8 in [1/2, 1)); 5 standard deviations.
    deviation = 2.0**-8 * math.sqrt(steps * 0.25 / count)
    assert abs(float(ends["stochastic"].mean()) - exact) < 5 * deviation
