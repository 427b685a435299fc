"""Gradients and copies of another type: taken, refused by name, or missing."""

from __future__ import annotations

import pytest
import references
import torch
from torch import Tensor, nn

from lightning_optim.optimizers import SGDOptim
from lightning_optim.registry import OPTIMIZERS

from .common import ENGINE, OPTIMIZER, ROUNDINGS, give_gradients, inputs_of, supported, take_step, weights


@pytest.mark.matrix(unless=lambda name, engine: references.representative(name) and engine == references.FASTEST)
@ENGINE
@OPTIMIZER
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "f16", "f64"])
def test_low_precision_gradients_in_and_copies_out(name: str, grad_dtype: torch.dtype, engine: str) -> None:
    """Float32 masters, gradients of another type, and the new weight also written as bfloat16."""
    options = {**references.BASE[name], "weight_decay": 0.1, "max_grad_norm": 1.0, "engine": engine}
    params, plain = weights(torch.float32), weights(torch.float32)
    copies: dict[Tensor, Tensor] = {
        p: torch.full_like(p, 7.0, dtype=torch.bfloat16, requires_grad=False) for p in params
    }
    optimizer, other = OPTIMIZERS[name].create(params, **options), OPTIMIZERS[name].create(plain, **options)
    for step in range(5):
        give_gradients(params, step)
        low: dict[Tensor, Tensor] = {p: p.grad.to(grad_dtype) for p in params if p.grad is not None}
        given = {p: g.clone() for p, g in low.items()}
        for p, q in zip(params, plain, strict=True):
            q.grad = low[p].float() if p in low else None
            p.grad = None
        inputs = inputs_of(name, params, step)
        optimizer._stepper.step(grads=low, copies=copies, inputs=inputs or None)
        take_step(
            other,
            {given: {q: values[p] for p, q in zip(params, plain, strict=True)} for given, values in inputs.items()},
        )
        for p, q in zip(params, plain, strict=True):
            # The clipping coefficient is a sum in another order: a rounding or two of its own.
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=(step + 1) * ROUNDINGS * 2.0**-22)
            if p in low:
                assert torch.equal(copies[p], p.detach().to(torch.bfloat16))
                assert torch.equal(low[p], given[p]), "the step changed a gradient"
            assert p.grad is None


@ENGINE
def test_a_copy_that_lies_otherwise_in_memory_is_refused_or_right(engine: str) -> None:
    p = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    optimizer = SGDOptim([p], lr=1.0, engine=engine)
    copy = torch.zeros(3, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"a copy must have .* its elements in the same order in memory"):
        optimizer._stepper.step(grads={p: torch.ones(3, 2)}, copies={p: copy})
    assert torch.equal(p.detach(), torch.arange(6.0).reshape(2, 3).t()), "a refused step changes nothing"


@ENGINE
@pytest.mark.parametrize(
    ("weight", "grad"),
    [(torch.float32, torch.complex64), (torch.complex64, torch.float32), (torch.float32, torch.int32)],
)
def test_a_gradient_of_another_kind_is_refused(weight: torch.dtype, grad: torch.dtype, engine: str) -> None:
    p = nn.Parameter(torch.ones(6, dtype=weight))
    optimizer = SGDOptim([p], lr=1.0, engine=engine)
    with pytest.raises(RuntimeError, match=f"parameter 0 .* {grad}"):
        optimizer._stepper.step(grads={p: torch.ones(6, dtype=grad)})
    assert torch.equal(p.detach(), torch.ones(6, dtype=weight))


@references.common_to_all
@ENGINE
@OPTIMIZER
def test_an_empty_or_missing_gradient_is_no_step(name: str, engine: str) -> None:
    params = weights(torch.float32)
    optimizer = OPTIMIZERS[name].create(params, engine=engine, **references.BASE[name])
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(p.detach(), b) for p, b in zip(params, before, strict=True))
    only_empty = nn.Parameter(torch.empty(0, 3))
    only_empty.grad = torch.empty(0, 3)
    optimizer = OPTIMIZERS[name].create(
        [only_empty], engine=engine, max_grad_norm=1.0, **supported(name, {"cautious": True})
    )
    for _ in range(3):
        optimizer.step()
    assert not optimizer.state or all(float(s.get("step", 3)) == 3 for s in optimizer.state.values())
