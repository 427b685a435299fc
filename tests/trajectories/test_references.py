"""Each step in each type and with each rounding is that of the float64 reference, through a reload."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from torch import Tensor

from lightning_optim.optimizers import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS

from .common import (
    ALL_CASES,
    ENGINE,
    OPTIMIZER,
    ROUNDINGS,
    STEPS,
    close,
    give_gradients,
    group_of,
    judged_run,
    reloaded,
    supported,
    weights,
    wide,
)


@ENGINE
@pytest.mark.parametrize(("name", "case"), ALL_CASES)
def test_float64_follows_the_reference_for_all_steps(name: str, case: str, engine: str) -> None:
    """The reference keeps its own state and is never corrected: errors would add up over the 50 steps."""
    params = weights(torch.float64)
    options = reference.cases(name)[case]
    state_dtype = getattr(torch, options.get("state_dtype", "float64"))

    def make() -> RuleOptimizer:
        return OPTIMIZERS[name].create(params, engine=engine, **options)

    optimizer = make()
    expected: list[tuple[Tensor, dict[str, Tensor]]] = [(wide(p), {}) for p in params]
    for step in range(STEPS):
        if step == STEPS // 2:
            optimizer = reloaded(optimizer, make)
        give_gradients(params, step)
        coefficient = reference.clip_coefficient(
            [p.grad for p in params if p.grad is not None], options.get("max_grad_norm")
        )
        optimizer.step()
        for index, p in enumerate(params):
            if p.grad is not None:
                value, state = expected[index]
                value, state = reference.step(name, value, coefficient * p.grad, state, group_of(optimizer, p))
                state = {k: v if k == "step" else v.to(state_dtype).double() for k, v in state.items()}
                expected[index] = value, state
        # Each of 50 steps adds at most ROUNDINGS roundings of 2^-53 relative to weights of size up to 4.
        close(params, [value for value, _ in expected], STEPS * ROUNDINGS * 2.0**-51)


@ENGINE
@pytest.mark.parametrize(("name", "case"), ALL_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_each_step_is_the_references(name: str, case: str, dtype: torch.dtype, engine: str) -> None:
    options = {"engine": engine, **reference.cases(name)[case]}
    # Each step is judged from where it starts, so that more steps only mean more numbers; low precision differs from
    # float32 in loads and stores alone.
    judged_run(name, options, weights(dtype), steps=14 if dtype == torch.float32 else 8)


@ENGINE
@OPTIMIZER
@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
@pytest.mark.parametrize("extra", [{}, {"cautious": True, "weight_decay": 0.1}, {"state_dtype": "bfloat16"}], ids=str)
def test_each_step_with_another_rounding_is_the_references(
    name: str, rounding: str, extra: dict[str, Any], engine: str
) -> None:
    options = {**reference.BASE[name], **supported(name, extra), "engine": engine, "rounding": rounding}
    if name != "adamw" and "decoupled_weight_decay" in OPTIMIZERS[name].options and extra.get("weight_decay"):
        options["decoupled_weight_decay"] = True  # the decay that Kahan summation must not lose
    judged_run(name, options, weights(torch.bfloat16), steps=8)
