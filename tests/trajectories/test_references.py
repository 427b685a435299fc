"""Each step in each type and with each rounding is that of the float64 reference, through a reload."""

from __future__ import annotations

from typing import Any

import pytest
import references
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
    inputs_of,
    judged_run,
    known_of,
    made,
    reloaded,
    supported,
    take_step,
    weights,
    wide,
)


# By default a kernel is compiled for each optimizer, and for each case of the representatives: it takes the compiler
# three times as long as the test. The foreach engine interprets.
@pytest.mark.matrix(
    unless=lambda name, case, engine: (
        case == "default"
        if engine == references.FASTEST
        else engine == "foreach"
        and (
            (references.representative(name) and case in references.TELLING)
            or case in references.REFERENCES[name].variants
        )
    )
)
@ENGINE
@pytest.mark.parametrize(("name", "case"), ALL_CASES)
def test_float64_follows_the_reference_for_all_steps(name: str, case: str, engine: str) -> None:
    """The reference keeps its own state and is never corrected: errors would add up over the 50 steps."""
    params = weights(torch.float64)
    options = references.cases(name)[case]

    def make() -> RuleOptimizer:
        return OPTIMIZERS[name].create(params, engine=engine, **options)

    optimizer = make()
    expected: list[tuple[Tensor, dict[str, Tensor]]] = [(wide(p), {}) for p in params]
    for step in range(STEPS):
        if step == STEPS // 2:
            optimizer = reloaded(optimizer, make)
        give_gradients(params, step)
        gradients = [p.grad for p in params]
        coefficient = references.clip_coefficient([g for g in gradients if g is not None], options.get("max_grad_norm"))
        inputs = inputs_of(name, params, step)
        groups = [known_of(p, group_of(optimizer, p)) for p in params]
        take_step(optimizer, inputs)
        expected = references.step_all(
            name,
            [value for value, _ in expected],
            [None if g is None else coefficient * g for g in gradients],
            [state for _, state in expected],
            [{**group, "made": made(optimizer, p)} for p, group in zip(params, groups, strict=True)],
            inputs={key: [given[p] for p in params] for key, given in inputs.items()},
        )
        for p, (_, state) in zip(params, expected, strict=True):
            for key, value in state.items():  # as it is stored
                state[key] = value.to(optimizer.state[p][key].dtype).double()
        # Each of 50 steps adds at most ROUNDINGS roundings of 2^-53 relative to weights of size up to 4.
        close(params, [value for value, _ in expected], STEPS * ROUNDINGS * 2.0**-51)


@pytest.mark.matrix(
    unless=lambda name, case, dtype, engine: (
        (
            dtype == torch.float32
            and engine == references.FASTEST
            and (references.representative(name) or case == "default")
        )
        or (dtype == torch.float32 and engine == "foreach" and case in references.REFERENCES[name].variants)
        or (
            references.representative(name)
            and case in references.TELLING
            and (engine == references.FASTEST or name in ("adamw", "lamb"))
        )
    )
)
@ENGINE
@pytest.mark.parametrize(("name", "case"), ALL_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
def test_each_step_is_the_references(name: str, case: str, dtype: torch.dtype, engine: str) -> None:
    options = {"engine": engine, **references.cases(name)[case]}
    # Each step is judged from where it starts, so that more steps only mean more numbers; low precision differs from
    # float32 in loads and stores alone.
    judged_run(name, options, weights(dtype), steps=14 if dtype == torch.float32 else 8)


@pytest.mark.matrix(
    unless=lambda name, engine: name == "adamw" or (references.representative(name) and engine == references.FASTEST)
)
@ENGINE
@OPTIMIZER
@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
@pytest.mark.parametrize("extra", [{}, {"cautious": True, "weight_decay": 0.1}, {"state_dtype": "bfloat16"}], ids=str)
def test_each_step_with_another_rounding_is_the_references(
    name: str, rounding: str, extra: dict[str, Any], engine: str
) -> None:
    options = {**references.BASE[name], **supported(name, extra), "engine": engine, "rounding": rounding}
    if name != "adamw" and "decoupled_weight_decay" in OPTIMIZERS[name].options and extra.get("weight_decay"):
        options["decoupled_weight_decay"] = True  # the decay that Kahan summation must not lose
    judged_run(name, options, weights(torch.bfloat16), steps=8)
