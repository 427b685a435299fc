"""Losses that are not finite, searches without result, closures that raise: the weights are never left elsewhere."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import LBFGS, LightningOptimWarning

from .common import Problem, regression, values

SEARCHES = pytest.mark.parametrize("search", ["strong_wolfe", "armijo", None])


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_optim.warnings._seen", set())


@SEARCHES
def test_no_closure(search: Any) -> None:
    optimizer = LBFGS([nn.Parameter(torch.ones(2))], line_search=search)
    with pytest.raises(RuntimeError, match=r"LBFGS: step\(\) without a closure, .*pass a function"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="the closure returned None"):
        optimizer.step(lambda: None)


@SEARCHES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_no_acceptable_point(search: Any, bad: float, where: str) -> None:
    """After some good steps: exactly the weights of before, their gradient, no history, one warning, a counter."""
    params, problem = regression(torch.float32)
    optimizer = LBFGS(params, line_search=search, lr=0.3)
    for _ in range(3):
        optimizer.step(problem)
    before, gradient = values(params), [p.grad.clone() for p in params if p.grad is not None]

    def broken() -> Tensor:
        loss = problem()
        if all(torch.equal(p, q) for p, q in zip(params, before, strict=True)):
            return loss
        if where == "loss":
            return loss * bad
        assert params[0].grad is not None
        params[0].grad[2, 1] = bad
        return loss

    with pytest.warns(LightningOptimWarning, match="no acceptable step: the weights are as before, and the history is"):
        loss = optimizer.step(broken)
    for p, q, g in zip(params, before, gradient, strict=True):
        assert torch.equal(p, q)
        assert p.grad is not None
        assert torch.equal(p.grad, g)
    assert optimizer.counts["failed_searches"] == 1
    assert optimizer.state_dict()["state"][0]["order"] == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        optimizer.step(broken)
    assert optimizer.counts["failed_searches"] == 2
    optimizer.step(problem)
    assert problem.loss().item() < loss.item()
    assert optimizer.counts["iterations"] == 4


@SEARCHES
def test_a_bad_start_leaves_the_step_out(search: Any) -> None:
    params, problem = regression()
    optimizer = LBFGS(params, line_search=search, lr=0.3)
    optimizer.step(problem)
    before, inner = values(params), problem.loss
    problem.loss = lambda: inner() * math.nan
    with pytest.warns(LightningOptimWarning, match="not finite before the step, which is left out .loss nan"):
        optimizer.step(problem)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    problem.loss = inner
    optimizer.step(problem)
    assert len(optimizer.state_dict()["state"][0]["order"]) == 2, "the history has done nothing wrong"


@pytest.mark.parametrize("search", ["strong_wolfe", "armijo"])
def test_a_search_goes_back_from_overflow(search: Any) -> None:
    """The first trial overflows; the step is found on this side."""
    x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    problem = Problem([x], lambda: (x - 0.01 * x.log()).sum() if bool((x > 0).all()) else x.sum() * math.inf)
    optimizer = LBFGS([x], lr=100.0, line_search=search)
    for _ in range(30):
        for group in optimizer.param_groups:
            group["lr"] = 100.0 if optimizer.counts["iterations"] == 0 else 1.0
        optimizer.step(problem)
    assert torch.allclose(x, torch.full_like(x, 0.01), rtol=1e-6)
    assert optimizer.counts["failed_searches"] == 0


@SEARCHES
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_exception_puts_the_weights_back(search: Any, call: int) -> None:
    params, problem = regression()
    optimizer = LBFGS(params, line_search=search, lr=0.3, max_iter=3)
    before, inner = values(params), problem.loss

    def loss() -> Tensor:
        if problem.calls == call:
            raise KeyboardInterrupt
        return inner()

    problem.loss = loss
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(problem)
    if call <= 2:  # in the first iteration
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    problem.calls = 100
    start = inner().item()
    for _ in range(5):
        optimizer.step(problem)
    assert inner().item() < start


def test_a_search_that_the_evaluations_of_a_step_did_not_suffice_for_is_no_failure() -> None:
    params, problem = regression()
    for limit in range(2, 12):
        LBFGS(params, max_iter=50, max_eval=limit).step(problem)


def test_at_the_end_of_all_precision_nothing_moves_uphill() -> None:
    """float32, far beyond convergence: comparisons within rounding are no failures that somebody should be told of."""
    params, problem = regression(torch.float32)
    optimizer = LBFGS(params, tolerance_grad=0.0)
    losses = [optimizer.step(problem).item() for _ in range(60)]
    assert max(losses[30:]) - min(losses[30:]) <= 4e-7 * losses[-1]
