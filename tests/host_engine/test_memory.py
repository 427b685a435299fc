"""What is read, and when: gradients only, memory that moved, and types that changed since the last step."""

from __future__ import annotations

from typing import Any

import pytest
import references
import torch
from torch import nn

from lightning_optim.engines import ENGINES
from lightning_optim.optimizers import LAMB, AdamWOptim
from lightning_optim.registry import OPTIMIZERS


@references.common_to_all
@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.unavailable() is None])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_only_read(name: str, engine: str) -> None:
    options = {"max_grad_norm": 0.1, "maximize": True, "cautious": True, "weight_decay": 0.1, "engine": engine}
    options = {option: value for option, value in options.items() if option in OPTIMIZERS[name].options}
    params = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 4).t().to(torch.bfloat16))]
    optimizer = OPTIMIZERS[name].create(params, **{**references.BASE[name], **options})
    for step in range(3):
        for p in params:
            p.grad = torch.randn(p.shape).to(p.dtype)
        given = [p.grad for p in params]
        known = [(g, g._version, g.data_ptr(), g.clone()) for g in given if g is not None]
        optimizer.step()
        for p, (g, version, address, value) in zip(params, known, strict=True):
            assert p.grad is g, step
            assert (g._version, g.data_ptr()) == (version, address)
            assert torch.equal(g, value)


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.unavailable() is None])
@pytest.mark.parametrize("moved", ["weight", "gradient", "state"])
def test_memory_that_moved_since_the_last_step_is_found(engine: str, moved: str) -> None:
    ends = []
    for moves in (False, True):
        p = nn.Parameter(torch.linspace(-1, 1, 40).reshape(5, 8))
        optimizer = AdamWOptim([p], lr=0.1, engine=engine)
        keep: list[Any] = []  # so that nothing is allocated where it was
        for step in range(6):
            grad = torch.linspace(1, 2, 40).reshape(5, 8) * (step + 1)
            if p.grad is None or moved != "gradient" or not moves:
                p.grad = grad
            else:
                keep.append(p.grad)
                p.grad = grad.t().contiguous().t()
            if moves and step >= 3 and moved == "weight":
                keep.append(p.data)
                p.data = p.data.clone() if step % 2 else p.data.t().contiguous().t()
            if moves and step >= 3 and moved == "state":
                state = optimizer.state[p]
                keep.append(dict(state))
                state["exp_avg"] = state["exp_avg"].t().contiguous().t() if step % 2 else state["exp_avg"].clone()
            optimizer.step()
        ends.append(p.detach().clone())
    assert torch.equal(ends[0], ends[1])


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.unavailable() is None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "f64"])
def test_weights_that_change_type_since_the_last_step(engine: str, dtype: torch.dtype) -> None:
    """As ``model.bfloat16()`` or ``model.double()`` after some steps: the state keeps its type, the math follows."""
    p = nn.Parameter(torch.linspace(-1, 1, 40))
    optimizer = LAMB([p], lr=0.1, engine=engine, adapt_1d=True)
    for _ in range(3):
        p.grad = torch.linspace(1, 2, 40)
        optimizer.step()
    p.data = p.data.to(dtype)
    p.grad = torch.linspace(1, 2, 40, dtype=torch.float64).to(dtype)
    before = p.detach().to(torch.float64, copy=True)
    state = {slot: value.double() for slot, value in optimizer.state[p].items()}
    optimizer.step()
    expected, _ = references.step("lamb", before, p.grad.double(), state, optimizer.param_groups[0])
    # Math in float64 for float64 weights, in float32 otherwise, and then one rounding to the weight's type.
    rtol = 2.0**-8 if dtype == torch.bfloat16 else 1e-13
    torch.testing.assert_close(p.detach().double(), expected, rtol=rtol, atol=rtol)
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.unavailable() is None])
def test_a_gradient_of_a_type_that_the_parameter_allows(engine: str) -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 40))
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    p.grad_dtype = torch.bfloat16
    q = nn.Parameter(p.detach().clone())
    p.grad = torch.linspace(1, 2, 40).to(torch.bfloat16)
    q.grad = p.grad.float()
    for weight in (p, q):
        AdamWOptim([weight], lr=0.1, engine=engine).step()
    assert torch.equal(p, q)
