"""Tensors whose memory holds the negatives or conjugates of their values are stepped by their values, or refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim.engines import ENGINES
from lightning_optim.stepping.method import Options
from lightning_optim.stepping.stepper import Stepper

from .common import known_warnings

pytestmark = [
    known_warnings,
    # An engine that is asked for by name, and rightly passed over, says so.
    pytest.mark.filterwarnings("ignore:.*engine cannot be used:lightning_optim.warnings.LightningOptimWarning"),
]

each_engine = pytest.mark.parametrize("engine", list(ENGINES))


def negated(x: Tensor) -> Tensor:
    """The same values, lazily negated."""
    return torch._neg_view(-x.detach())


def conjugated(x: Tensor) -> Tensor:
    """The same values, lazily conjugated."""
    return x.detach().conj_physical().conj()


def pair() -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))]


@each_engine
@pytest.mark.parametrize("make", [lightning_optim.SGD, lightning_optim.AdamW, lightning_optim.Muon])
def test_signs_of_gradients_may_change_in_any_bucket_at_any_step(make: Any, engine: str) -> None:
    weights, twins = pair(), pair()
    optimizer, straight = (
        make([{"params": p, **({"use_muon": False} if make is lightning_optim.Muon else {})}], lr=0.5, engine=engine)
        for p in (weights, twins)
    )
    for lazy in itertools.product([False, True], repeat=2):
        for p, q, here in zip(weights, twins, lazy, strict=True):
            g = torch.tensor([0.5, -1.0], dtype=p.dtype)
            p.grad, q.grad = negated(g) if here else g, g
        optimizer.step()
        straight.step()
        for p, q in zip(weights, twins, strict=True):
            assert torch.equal(p, q)


def test_plans_for_both_signs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_optim.stepping.plan import Planner

    built: list[Any] = []
    build = Planner.build

    def counted(*args: Any) -> Any:
        built.append(args)
        return build(*args)

    monkeypatch.setattr(Planner, "build", counted)
    weights = pair()
    optimizer = lightning_optim.SGD(weights, lr=0.1)
    for step in range(8):
        for index, p in enumerate(weights):
            p.grad = negated(torch.ones_like(p)) if step % 2 == index else torch.ones_like(p)
        optimizer.step()
    assert len(built) == 2


@each_engine
def test_a_lazily_negated_weight_is_stepped(engine: str) -> None:
    weight, twin = (nn.Parameter(torch.arange(1.0, 7.0)) for _ in range(2))
    optimizer, straight = (lightning_optim.AdamW([p], lr=0.1, engine=engine) for p in (weight, twin))
    for step in range(4):
        if step == 2:  # at the very place of the planned weight, whose memory then holds what it must
            memory = weight.data
            memory.neg_()
            weight.data = torch._neg_view(memory)
            assert weight.is_neg()
        weight.grad, twin.grad = (torch.full((6,), step - 1.5) for _ in range(2))
        optimizer.step()
        straight.step()
        torch.testing.assert_close(weight.detach().resolve_neg(), twin.detach())


@each_engine
def test_lazy_signs_of_state_are_resolved(engine: str) -> None:
    weight, twin = (nn.Parameter(torch.ones(4, dtype=torch.cfloat)) for _ in range(2))
    optimizer, straight = (lightning_optim.SGD([p], lr=0.1, momentum=0.9, engine=engine) for p in (weight, twin))
    for step in range(5):
        if step >= 2:
            buffer = optimizer.state[weight]["momentum_buffer"]
            view = conjugated(buffer) if step % 2 else negated(buffer)
            if step == 4:  # where the planned one lies
                view = torch._neg_view(buffer.neg_())
            optimizer.state[weight]["momentum_buffer"] = view
        for p in (weight, twin):
            p.grad = torch.full((4,), 1 + 2j)
        optimizer.step()
        straight.step()
        assert torch.equal(weight, twin)


@each_engine
@pytest.mark.parametrize("lazy", [negated, conjugated, lambda x: negated(conjugated(x))])
def test_complex_gradients_have_their_values(lazy: Any, engine: str) -> None:
    weight, twin = (nn.Parameter(torch.tensor([1 + 1j, 2 - 1j])) for _ in range(2))
    optimizer, straight = (lightning_optim.AdamW([p], lr=0.1, engine=engine) for p in (weight, twin))
    for step in range(4):
        g = torch.tensor([1 + 2j, 3 - 4j])
        weight.grad, twin.grad = lazy(g) if step % 2 else g, g.clone()
        optimizer.step()
        straight.step()
        assert torch.equal(weight, twin)


@each_engine
def test_a_lazily_negated_complex_weight_is_stepped(engine: str) -> None:
    values = torch.tensor([1 + 1j, 2 - 1j])
    weight, twin = nn.Parameter(negated(values)), nn.Parameter(values.clone())
    for p in (weight, twin):
        p.grad = torch.tensor([1 + 2j, 3 - 4j])
        lightning_optim.SGD([p], lr=1.0, engine=engine).step()
    assert torch.equal(weight.detach().resolve_neg(), twin.detach())
    assert not torch.equal(twin.detach(), values)


def test_a_lazily_conjugated_weight_is_refused_at_construction() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.cfloat).conj())
    with pytest.raises(ValueError, match=r"parameter 0 of the group.*lazily conjugated.*valid: its resolve_conj\(\)"):
        lightning_optim.SGD([weight])
    with pytest.raises(ValueError, match=r"adopt.*parameter 0.*lazily conjugated"):
        lightning_optim.adopt(torch.optim.SGD([weight], lr=0.1))


@each_engine
def test_a_weight_that_becomes_lazily_conjugated_is_refused(engine: str) -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.cfloat))
    optimizer = lightning_optim.SGD([weight], lr=1.0, engine=engine)
    for _ in range(2):
        weight.grad = torch.ones(2, dtype=torch.cfloat)
        optimizer.step()
    weight.data = weight.data.conj()
    weight.grad = torch.ones(2, dtype=torch.cfloat)
    before = weight.detach().resolve_conj().clone()
    with pytest.raises(RuntimeError, match=r"parameter 0 .* cannot be stepped: it is lazily conjugated"):
        optimizer.step()
    assert torch.equal(weight.detach().resolve_conj(), before)


@each_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.cfloat])
def test_lazy_copies_are_refused_or_right(engine: str, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(3, dtype=dtype))
    owner = lightning_optim.SGD([weight], lr=1.0, engine=engine)
    stepper = Stepper(owner, type(owner), Options(engine=engine))
    gradient, plain = torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)
    with torch.no_grad():
        stepper.step({weight: gradient}, {weight: plain})
        assert torch.equal(plain, weight)
        lazy = plain.conj() if dtype.is_complex else torch._neg_view(plain)
        with pytest.raises(ValueError, match="a copy must"):
            stepper.step({weight: gradient}, {weight: lazy})
    assert torch.equal(weight.detach(), torch.zeros(3, dtype=dtype))


@each_engine
def test_an_adopted_optimizer_and_steps_in_the_backward_pass_read_signs_too(engine: str) -> None:
    from lightning_optim.control.step_in_backward import StepInBackward

    weights = [nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0, dtype=torch.float64))]
    adopted = lightning_optim.adopt(torch.optim.SGD(weights[:1], lr=1.0), engine=engine)
    ours = StepInBackward(lightning_optim.SGD(weights[1:], lr=1.0, engine=engine))
    for step in range(1, 5):
        for p in weights:
            lazily = (torch.complex(torch.zeros_like(p), p).conj() * 2j).real
            (lazily if step % 2 else 2 * p).backward()
        adopted.step()
        weights[0].grad = None
        ours.finish()
        assert [p.item() for p in weights] == [-2.0 * step] * 2
