"""Weights in low and mixed precision, and losses with noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import LBFGS

from .common import Problem, regression, state_copy, values

# Where the loss is all rounding, searches may end without result, which is said.
at_the_floor = pytest.mark.filterwarnings("ignore:.*no acceptable step:lightning_optim.LightningOptimWarning")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def quadratic(dtype: torch.dtype, n: int = 40) -> tuple[nn.Parameter, Problem]:
    """Computed in float32 from weights of this type; the best weights are not representable."""
    generator = torch.Generator().manual_seed(0)
    goal = torch.randn(n, generator=generator)
    hessian = torch.logspace(0, 2, n)
    p = nn.Parameter(torch.zeros(n).to(dtype))
    return p, Problem([p], lambda: (hessian * (p.float() - goal).square()).sum() / 2)


@at_the_floor
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("search", ["strong_wolfe", "armijo"])
def test_low_precision_weights_reach_what_they_can(dtype: torch.dtype, search: Any) -> None:
    p, problem = quadratic(dtype)
    optimizer = LBFGS([p], line_search=search, noise=1e-3)
    first = problem.loss().item()
    for _ in range(40):
        optimizer.step(problem)
    exact, exact_problem = quadratic(F32)
    reference = LBFGS([exact], line_search=search)
    for _ in range(40):
        reference.step(exact_problem)
    with torch.no_grad():
        p_best, problem_best = quadratic(dtype)
        p_best.copy_(exact)
        rounded = problem_best.loss().item()  # of the best weights, rounded
    # Where no direction improves the rounded weights, each may still be a unit from its best.
    assert problem.loss().item() < 10 * rounded < 1e-3 * first


def test_the_master_copy_rounds_to_the_weights_and_moves_between_them() -> None:
    """Steps below half a unit in the last place add up."""
    p = nn.Parameter(torch.tensor([1.0], dtype=BF16))
    ulp = 2**-7
    problem = Problem([p], lambda: -(p.float() * 1.0).sum())
    optimizer = LBFGS([p], lr=ulp / 4, line_search=None)
    seen = []
    for _ in range(8):
        optimizer.step(problem)
        master = optimizer.state_dict()["state"][0]["master"]
        assert torch.equal(master.to(BF16), p.detach())
        seen.append(p.item())
    assert seen[0] == 1.0
    assert seen[-1] == 1 + 2 * ulp


def test_weights_that_someone_else_sets_are_taken_over() -> None:
    p, problem = quadratic(BF16)
    optimizer = LBFGS([p])
    optimizer.step(problem)
    with torch.no_grad():
        p.fill_(3.0)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(problem)
    assert p.eq(3.0).all()
    assert optimizer.state_dict()["state"][0]["master"].eq(3.0).all()


@at_the_floor
def test_mixed_types_in_one_history() -> None:
    """The float64 part makes the master copies float64, and each weight is that rounded to its type."""
    dtypes = (BF16, F16, F32, F64)
    generator = torch.Generator().manual_seed(0)
    goals = [torch.randn(6, generator=generator, dtype=F64) for _ in dtypes]
    params = [nn.Parameter(torch.zeros(6, dtype=dtype)) for dtype in dtypes]
    problem = Problem(
        params, lambda: torch.stack([(p.double() - g).square().sum() for p, g in zip(params, goals, strict=True)]).sum()
    )
    optimizer = LBFGS(params, noise=1e-4)
    for _ in range(10):
        optimizer.step(problem)
    for p, goal in zip(params, goals, strict=True):
        torch.testing.assert_close(p.detach().double(), goal, rtol=2 * torch.finfo(p.dtype).eps, atol=1e-5)
    state = optimizer.state_dict()["state"]
    assert {number: s["master"].dtype for number, s in state.items() if "master" in s} == {0: F64, 1: F64, 2: F64}
    assert state[0]["history"].dtype == F64


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_float64_history_of_other_weights(dtype: torch.dtype) -> None:
    p, problem = quadratic(dtype)
    optimizer = LBFGS([p], history_dtype="float64")
    optimizer.step(problem)
    state = optimizer.state_dict()["state"][0]
    assert (state["history"].dtype, state["master"].dtype) == (F64, F64)
    assert torch.equal(state["master"].to(dtype), p.detach())


def noisy(scale: float) -> tuple[list[nn.Parameter], Problem]:
    """Deterministic in the weights, as rounding is, but nowhere smooth: relative errors of loss and gradient."""
    params, problem = regression(shapes=((8, 5),))
    inner = problem.loss

    def loss() -> Tensor:
        seed = int(params[0].detach().view(torch.int64).sum()) % 2**31
        error = torch.randn((), generator=torch.Generator().manual_seed(seed), dtype=F64)
        return inner() * (1 + scale * error.clamp(-1, 1))

    problem.loss = loss
    return params, problem


@at_the_floor
def test_noise_lets_a_search_end_where_it_can() -> None:
    """Without it, searches fail where noise is all there is; with it, the loss is as low and none fails."""
    results = {}
    for noise in (0.0, 1e-3):
        params, problem = noisy(1e-3)
        optimizer = LBFGS(params, noise=noise, line_search="armijo")
        for _ in range(40):
            optimizer.step(problem)
        results[noise] = problem.loss().item(), optimizer.counts["failed_searches"]
    assert results[0.0][1] > 0
    assert results[1e-3][1] == 0
    best = regression(shapes=((8, 5),))
    reference = LBFGS(best[0])
    for _ in range(100):
        reference.step(best[1])
    assert results[1e-3][0] < (1 + 2e-2) * best[1].loss().item()


def test_pairs_stand_out_of_the_noise() -> None:
    """The gradient of a flat quadratic hardly changes over a short step: the pair is longer, or skipped."""

    def problem_of(curvature: float) -> tuple[nn.Parameter, Problem]:
        x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=F64))
        return x, Problem([x], lambda: x.sum() + curvature / 2 * x.square().sum())

    for curvature, kept, further in ((1e-1, True, False), (4e-3, True, True), (1e-4, False, True)):
        x, problem = problem_of(curvature)
        optimizer = LBFGS([x], noise=1e-3, line_search="armijo")
        before = x.detach().clone()
        optimizer.step(problem)
        state = optimizer.state_dict()["state"][0]
        assert optimizer.counts["skipped_pairs"] == (not kept)
        assert state["order"] == ([0] if kept else [])
        moved = (x.detach() - before).norm()
        if kept:
            assert (state["history"][0, 0].norm() > 1.5 * moved) == further
        assert (problem.calls > 2) == further
        assert x.grad is not None
        found = x.grad.clone()
        problem()
        assert torch.equal(found, x.grad), "the gradient is that of the step's end, not of the longer pair's"


def test_noise_is_measured_at_the_first_step_and_saved() -> None:
    params, problem = noisy(1e-3)
    optimizer = LBFGS(params, noise="auto")
    assert optimizer.noise is None
    optimizer.step(problem)
    assert optimizer.noise is not None
    assert 2e-4 < optimizer.noise < 4e-3
    other = LBFGS(noisy(1e-3)[0], noise="auto")
    other.load_state_dict(state_copy(optimizer))
    assert other.noise == optimizer.noise
    smooth, exact = regression()
    quiet = LBFGS(smooth, noise="auto")
    quiet.step(exact)
    assert quiet.noise is not None
    assert quiet.noise < 1e-12
    before = values(smooth)
    quiet.step(exact)
    assert any(not torch.equal(p, q) for p, q in zip(smooth, before, strict=True))
