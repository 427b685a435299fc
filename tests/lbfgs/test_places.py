"""Parameters that are the same memory are one variable; what shares memory in part, or changes places, is seen."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_optim import LBFGS, LightningOptimWarning

from .common import Closure, Problem, regression, start, values


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_optim.warnings._seen", set())


def quadratic(params: list[nn.Parameter], factors: list[float]) -> Problem:
    def loss() -> Tensor:
        return torch.stack([f * (p - 1).square().sum() for f, p in zip(factors, params, strict=True)]).sum()

    return Problem(params, loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"line_search": "armijo"}, {"weight_decay": 0.1}, {"max_iter": 4}])
def test_weights_tied_through_data_are_one_variable(options: dict[str, Any], dtype: torch.dtype) -> None:
    """With the sum of their gradients, as if they were one parameter."""
    once = nn.Parameter(torch.linspace(-2, 2, 5, dtype=torch.float64).to(dtype))
    p = nn.Parameter(once.detach().clone())
    q = nn.Parameter(p.data)
    tied = LBFGS([p, q], **options)
    single = LBFGS([once], **options | {"weight_decay": 2 * options.get("weight_decay", 0)})
    for _ in range(4):
        tied.step(quadratic([p, q], [1.0, 3.0]))
        single.step(quadratic([once, once], [1.0, 3.0]))
    assert p.data_ptr() == q.data_ptr()
    torch.testing.assert_close(p, once, rtol=0, atol=1e-2 if dtype is torch.bfloat16 else 1e-6)


def test_a_closure_that_raises_leaves_tied_weights_as_they_were() -> None:
    p = nn.Parameter(torch.linspace(-2, 2, 5))
    q = nn.Parameter(p.data)
    problem, before = quadratic([p, q], [1.0, 3.0]), p.detach().clone()

    def closure() -> Tensor:
        if problem.calls == 1:
            raise ZeroDivisionError
        return problem()

    with pytest.raises(ZeroDivisionError):
        LBFGS([p, q]).step(closure)
    assert torch.equal(p, before)


def test_overlaps_in_part_are_refused() -> None:
    flat = torch.zeros(8)
    p, q = nn.Parameter(flat[:5]), nn.Parameter(flat[3:])
    with pytest.raises(ValueError, match=r"LBFGS: parameter 1, of shape .* shares memory in part with .* 0; valid"):
        LBFGS([p, q])
    with pytest.raises(ValueError, match=r"parameter 0, of shape .3, 2., has elements that are one place.*contiguous"):
        LBFGS([nn.Parameter(torch.zeros(2).expand(3, 2))])
    numbers = np.zeros(8, dtype=np.float32)  # one piece of memory, of which torch makes two storages
    with pytest.raises(ValueError, match=r"LBFGS: parameter 1, .* shares memory in part"):
        LBFGS([nn.Parameter(torch.from_numpy(part)) for part in (numbers[:5], numbers[3:])])
    with pytest.raises(ValueError, match=r"parameter 0, of shape .3, 2., has elements that are one place"):
        LBFGS([nn.Parameter(flat.as_strided((3, 2), (1, 1)))])
    optimizer = LBFGS([nn.Parameter(flat[:4]), later := nn.Parameter(torch.zeros(5))])
    later.data = flat[3:]
    with pytest.raises(ValueError, match=r"LBFGS: parameter 1, .* shares memory in part"):
        optimizer.step(lambda: torch.zeros(()))


def test_neighbours_are_not() -> None:
    """The columns of one matrix, the parts of one buffer, and what has no memory yet."""
    matrix = torch.zeros(4, 2)
    LBFGS([nn.Parameter(matrix[:, 0]), nn.Parameter(matrix[:, 1])])
    LBFGS([nn.Parameter(matrix.view(-1)[:3]), nn.Parameter(matrix.view(-1)[3:])])
    LBFGS([nn.Parameter(torch.zeros(size, device="meta")) for size in (3, 4)])


@pytest.mark.parametrize("change", ["groups", "parameters"])
def test_parameters_that_change_places_have_no_history(change: str) -> None:
    """Of the same sizes, they would take each other's."""
    params = [start(6), start(6)]
    problem = quadratic(params, [1.0, 30.0])
    optimizer = LBFGS([{"params": [p], "lr": 1.0} for p in params] if change == "groups" else params)
    for _ in range(2):
        optimizer.step(problem)
    if change == "groups":
        optimizer.param_groups.reverse()
    else:
        optimizer.param_groups[0]["params"].reverse()
    assert "history" not in optimizer.state_dict()["state"].get(0, {})
    with pytest.warns(LightningOptimWarning, match="or in another order, so the history starts anew"):
        optimizer.step(problem)
    optimizer.step(problem)
    assert optimizer.counts["iterations"] == 4


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])  # noqa: S301
def test_a_copy_goes_on(duplicate: Any) -> None:
    params, problem = regression()
    optimizer = LBFGS(params)
    for _ in range(3):
        optimizer.step(problem)
    others, other = duplicate((params, optimizer))
    matching = Matching(others, problem, params)
    for _ in range(3):
        optimizer.step(problem)
    for _ in range(3):
        other.step(matching)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert other.counts == optimizer.counts


class Matching:
    """The closure of a problem at the weights of other parameters."""

    def __init__(self, params: list[nn.Parameter], problem: Closure, of: list[nn.Parameter]) -> None:
        self.params, self.problem, self.of = params, problem, of

    @torch.no_grad()
    def __call__(self) -> Tensor:
        before = values(self.of)
        for p, q in zip(self.of, self.params, strict=True):
            p.copy_(q)
        with torch.enable_grad():
            loss = self.problem()
        for p, q, old in zip(self.params, self.of, before, strict=True):
            assert q.grad is not None
            p.grad = q.grad.clone()
            q.copy_(old)
        return loss
