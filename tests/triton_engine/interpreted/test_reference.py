"""Every rule and policy in Triton's interpreter against the float64 reference and the eager engine."""

from __future__ import annotations

from typing import Any

import pytest
import references
import torch
from torch import Tensor

from lightning_optim.registry import OPTIMIZERS

from .common import PRINTED, SHAPES, give_gradients, group_of, make, weights

STEPS = 20
#: By default, in all cases but one: Triton's interpreter takes about a second for ten steps of three tensors.
FEW_STEPS = 6
#: In the interpreter a step takes as long as there are tensors.
FEW = ((3, 5), (), (33, 31))
CASES = [
    (name, case)
    for name in references.NAMES
    # No kernel has rows and columns; SOAP's first bases are not unique, so that its runs drift apart (test_matrix has
    # it); and what Sophia asks for the trajectories' tests give it, on other engines.
    if name not in ("adafactor", "soap", "sophia")
    for case in references.cases(name)
    if "bfloat16" not in case
]


def options_of(name: str, case: str) -> dict[str, Any]:
    return {"lr": 0.02, **references.cases(name)[case]}


@pytest.mark.matrix(
    unless=lambda name, case: (
        case == "default" or (references.representative(name) and case in (*references.TELLING, "adapt_1d"))
    )
)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_float64_reference(name: str, case: str, request: pytest.FixtureRequest) -> None:
    """As close as torch's own optimizers come in float32: 1e-6 after 20 steps, through a reload."""
    all_steps = (name, case) == ("adamw", "default") or request.config.getoption("--matrix")
    steps = STEPS if all_steps else FEW_STEPS
    options = options_of(name, case)
    params = weights(shapes=SHAPES if case == "default" else FEW)
    optimizer = make(name, params, **options)
    settings = {**optimizer.defaults, "max_grad_norm": options.get("max_grad_norm")}
    exact: list[tuple[Tensor, dict[str, Tensor]]] = [(p.detach().double(), {}) for p in params]
    for step in range(steps):
        give_gradients(params, step)
        before = [p.grad.clone() for p in params if p.grad is not None]
        groups = [{**settings, **group_of(optimizer, p)} for p in params]
        optimizer.step()
        factor = references.clip_coefficient(before, settings["max_grad_norm"])
        old, states = [value for value, _ in exact], [state for _, state in exact]
        exact = references.step_all(name, old, [factor * g.double() for g in before], states, groups)
        for p, g in zip(params, before, strict=True):
            assert p.grad is not None
            assert torch.equal(p.grad, g)
        if step == steps // 2:
            fresh = make(name, params, **options)
            fresh.load_state_dict(optimizer.state_dict())
            optimizer = fresh
    for p, (q, _) in zip(params, exact, strict=True):
        # Lion's sign and the cautious mask jump: an element on the edge may take the other side of it.
        jumps = name == "lion" or "cautious" in case
        torch.testing.assert_close(p.double(), q, rtol=1e-6, atol=5e-2 if jumps else 1e-6)
        if jumps:
            assert ((p - q).abs() > 1e-5).sum() <= 2
    assert "triton (requested)" in optimizer.engine_report()


POLICIES: dict[str, dict[str, Any]] = {
    "nearest": {},
    "kahan": {"rounding": "kahan"},
    "stochastic": {"rounding": "stochastic"},
    "stochastic_state": {"rounding": "stochastic", "state_dtype": "bfloat16"},
    "clip": {"max_grad_norm": 0.5},
}


@pytest.mark.matrix(
    unless=lambda name, policy, dtype: (
        policy in ("kahan", "stochastic_state")
        if references.representative(name) and dtype == torch.bfloat16
        else name == "lamb" and policy == "nearest"
    )
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", PRINTED)
def test_storage_types_and_rounding(name: str, policy: str, dtype: torch.dtype) -> None:
    """The same bits as the eager engine, noise included, but where float32 itself rounds otherwise."""
    if dtype != torch.bfloat16 and "stochastic" in policy:
        pytest.skip("stochastic rounding is for bfloat16")
    if name == "soap" and policy == "clip":
        pytest.skip("its first bases are not unique: a norm that is summed in another order turns them")
    ends: list[list[Tensor]] = []
    for engine in ("triton", "eager"):
        params = weights(dtype)
        optimizer = make(name, params, engine=engine, **POLICIES[policy])
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
        slots = [v for p in params for k, v in optimizer.state[p].items() if k != "step"]
        ends.append([*(p.detach() for p in params), *slots])
    ulp = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-6, torch.float64: 1e-14}
    for a, b in zip(*ends, strict=True):
        # Newton-Schulz steps magnify the last bits, of which compensation terms are made.
        torch.testing.assert_close(a, b, rtol=ulp[a.dtype], atol=2e-5 if OPTIMIZERS[name].kind == "matrix" else 1e-6)
    if dtype == torch.float64 or policy == "kahan":  # a compensation term is as different as the last bits are
        return
    low = [(a, b) for a, b in zip(*ends, strict=True) if a.dtype == dtype]
    assert sum(int((a != b).sum()) for a, b in low) <= 0.01 * sum(a.numel() for a, _ in low)


def test_a_large_tensor_takes_the_branch_without_masks() -> None:
    from lightning_optim.engines.triton import engine

    ends = []
    for name in ("triton", "eager"):
        params = weights(shapes=[(2 * engine.CHUNK + 5,), (engine.CHUNK,)])
        memory = torch.zeros(engine.CHUNK + 1)
        params.append(torch.nn.Parameter(memory[1:]))  # not aligned to 16 bytes
        optimizer = make("lamb", params, engine=name, weight_decay=0.1, max_grad_norm=1.0)
        for step in range(2):
            give_gradients(params, step)
            optimizer.step()
        ends.append([p.detach() for p in params])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
