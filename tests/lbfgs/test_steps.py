"""What steps do: Rosenbrock, torch's trajectory, groups, weight decay, and parameters of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import LBFGS

from .common import Problem, regression, rosenbrock, start, two_loop, values

EXACT: dict[str, Any] = {"tolerance_grad": 0.0, "tolerance_change": 0.0}


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        ({"reuse_evaluation": False}, 1500),
        ({"reuse_evaluation": True}, 800),
        ({"max_iter": 20}, 900),
        ({"line_search": "armijo", "reuse_evaluation": True}, 800),
        ({"history_size": 100, "reuse_evaluation": True}, 800),
        ({"history_dtype": "float32"}, 1500),
    ],
)
def test_rosenbrock_100(options: dict[str, Any], evaluations: int) -> None:
    """f < 1e-15, where torch.optim.LBFGS takes 627 evaluations. A default step evaluates its start again."""
    x = start()
    problem = Problem([x], lambda: rosenbrock(x))
    optimizer = LBFGS([x], **EXACT, **options)
    while float(rosenbrock(x.detach())) >= 1e-15 and problem.calls < evaluations:
        optimizer.step(problem)
    assert float(rosenbrock(x.detach())) < 1e-15
    assert problem.calls == optimizer.counts["evaluations"] <= evaluations
    assert optimizer.counts["failed_searches"] == 0
    assert (x.detach() - 1).abs().max() < 1e-6


@pytest.mark.parametrize("per_step", [1, 5])
def test_a_fixed_step_is_torchs(per_step: int) -> None:
    """Without a line search nothing but the order of operations differs from ``torch.optim.LBFGS``."""
    (ours, ours_problem), (theirs, their_problem) = regression(), regression()
    options: dict[str, Any] = {"lr": 0.1, "history_size": 4, "max_iter": per_step, **EXACT}
    optimizer = LBFGS(ours, line_search=None, **options)
    other = torch.optim.LBFGS(theirs, max_eval=1000, **options)
    for _ in range(20 // per_step):
        loss, expected = optimizer.step(ours_problem), other.step(their_problem)
        assert isinstance(expected, torch.Tensor)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)  # float64, but twenty steps amplify


def test_the_direction_is_that_of_the_two_loop_recursion_throughout_a_run() -> None:
    params, problem = regression()
    optimizer = LBFGS(params, history_size=3, line_search=None, lr=0.5, **EXACT)
    pairs: list[tuple[Tensor, Tensor]] = []
    for step in range(8):
        before, _ = torch.cat([p.detach().reshape(-1) for p in params]), problem()
        gradient = torch.cat([p.grad.reshape(-1) for p in params if p.grad is not None])
        optimizer.step(problem)
        moved = torch.cat([p.detach().reshape(-1) for p in params]) - before
        if step:
            expected = 0.5 * two_loop(gradient, pairs[-3:])
            assert (moved - expected).norm() <= 1e-10 * expected.norm()
        after = torch.cat([p.grad.reshape(-1) for p in params if p.grad is not None])
        pairs.append((moved, after - gradient))


@pytest.mark.parametrize("search", ["strong_wolfe", "armijo", None])
def test_after_a_step_the_gradient_is_that_of_its_end(search: Any) -> None:
    params, problem = regression()
    optimizer = LBFGS(params, line_search=search, lr=0.3)
    for _ in range(6):
        first = problem()
        assert float(optimizer.step(problem).detach()) == float(first.detach()), "the loss before the step"
        found = [p.grad.clone() for p in params if p.grad is not None]
        problem()
        for gradient, p in zip(found, params, strict=True):
            assert p.grad is not None
            assert torch.equal(gradient, p.grad)


def test_a_search_that_ends_elsewhere_evaluates_again() -> None:
    """Two trials are not enough for the slope: the first is taken, as the second was behind a wall."""
    x = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))

    def loss() -> torch.Tensor:  # steeper and steeper up to 1.3, then a wall
        return -(x.exp()).sum() + torch.relu(x - 1.3).pow(2).sum() * 1e4

    problem = Problem([x], loss)
    optimizer = LBFGS([x], max_eval=3)
    optimizer.step(problem)
    assert x.item() == 1.0
    assert problem.calls == 4
    assert x.grad is not None
    found = x.grad.clone()
    problem()
    assert torch.equal(found, x.grad)


def test_reuse_saves_an_evaluation_and_notices_other_weights() -> None:
    results, calls = [], []
    for reuse in (False, True):
        params, problem = regression()
        optimizer = LBFGS(params, reuse_evaluation=reuse)
        for step in range(6):
            optimizer.step(problem)
            if step == 3:
                with torch.no_grad():
                    params[1].mul_(0.5)
        results.append(values(params))
        calls.append(problem.calls)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert calls[0] - calls[1] == 4  # not at the first step, and not after the change


def test_a_groups_lr_is_its_share_of_the_direction() -> None:
    moved = []
    for scale in (1.0, 0.25, 0.0):
        params, problem = regression()
        before = values(params)
        groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "lr": scale}]
        optimizer = LBFGS(groups, line_search=None)
        optimizer.step(problem)
        moved.append([p.detach() - q for p, q in zip(params, before, strict=True)])
    for whole, quarter, none, first in zip(*moved, (True, False, False, False), strict=True):
        assert torch.allclose(quarter, whole * (1 if first else 0.25), rtol=1e-12)
        assert torch.allclose(none, whole * (1 if first else 0), rtol=1e-12)


def test_unequal_lr_that_turn_the_direction_uphill_drop_the_history() -> None:
    """A narrow valley along the diagonal, of which only one coordinate is to move."""
    x, y = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (3.0, 2.9))
    problem = Problem([x, y], lambda: (x + y) ** 2 / 100 + 50 * (x - y) ** 2 + (x - y + 0.1) ** 4)
    optimizer = LBFGS([{"params": [x]}, {"params": [y]}])
    losses = []
    for lrs in [(1.0, 1.0)] * 4 + [(1.0, 1e-3), (1e-3, 1.0)] * 4:
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        losses.append(float(optimizer.step(problem).detach()))
    assert losses == sorted(losses, reverse=True)
    assert optimizer.counts["failed_searches"] == 0


def test_all_lr_zero_is_no_step() -> None:
    params, problem = regression()
    before = values(params)
    LBFGS(params, lr=0.0).step(problem)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert problem.calls == 1


def test_a_scheduler_and_a_tensor_lr() -> None:
    params, problem = regression()
    optimizer = LBFGS(params, lr=torch.tensor(1.0), line_search=None)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before = values(params)
    optimizer.step(problem)
    moved = [p.detach() - q for p, q in zip(params, before, strict=True)]
    other, other_problem = regression()
    half = LBFGS(other, lr=0.5, line_search=None)
    half.step(other_problem)
    for p, q, m in zip(other, before, moved, strict=True):
        assert torch.allclose(p.detach() - q, m / 2, rtol=1e-12)
    schedule.step()
    assert float(optimizer.param_groups[0]["lr"]) == 0.5


def test_weight_decay_is_part_of_loss_and_gradient() -> None:
    """The same weights as with the term written into the loss; ``p.grad`` and the returned loss are without it."""
    (params, problem), (others, plain) = regression(), regression()
    groups: list[dict[str, Any]] = [{"params": params[:1], "weight_decay": 0.3}, {"params": params[1:]}]
    optimizer = LBFGS(groups, weight_decay=0.1, reuse_evaluation=True)
    inner = plain.loss
    plain.loss = lambda: inner() + 0.15 * others[0].square().sum() + 0.05 * sum(p.square().sum() for p in others[1:])
    other = LBFGS(others)
    for step in range(12):
        optimizer.step(problem)
        other.step(plain)
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)  # a search doubles what rounding left, twelve times
        if step == 0:
            found = params[0].grad
            problem()
            assert found is not None
            assert params[0].grad is not None
            assert torch.equal(found, params[0].grad)
    assert optimizer.counts["iterations"] == 12


def test_frozen_parameters_and_those_without_gradient() -> None:
    params, problem = regression()
    params[1].requires_grad_(False)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    before = values([params[1], unused])
    optimizer = LBFGS([*params, unused])
    for _ in range(5):
        optimizer.step(problem)
    assert torch.equal(params[1], before[0])
    assert torch.equal(unused, before[1])
    assert unused.grad is None
    history = optimizer.state_dict()["state"][0]
    assert history["sizes"] == [[15, 1, 3]]
    assert problem.loss().item() < regression()[1].loss().item()


def test_nothing_to_train() -> None:
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    assert LBFGS([frozen]).step(lambda: 3.0) == 3.0


def test_other_parameters_start_a_new_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_optim.warnings._seen", set())
    params, problem = regression()
    params[1].requires_grad_(False)
    optimizer = LBFGS(params)
    for _ in range(3):
        optimizer.step(problem)
    params[1].requires_grad_(True)
    with pytest.warns(UserWarning, match="other parameters are trained than before"):
        optimizer.step(problem)
    assert len(optimizer.state_dict()["state"][0]["order"]) == 1


@pytest.mark.parametrize("shape", ["transposed", "channels_last", "strided"])
def test_memory_layouts(shape: str) -> None:
    """The trap of other offloaded optimizers: such weights are silently not updated."""

    def problem_of(contiguous: bool) -> tuple[nn.Parameter, Problem]:
        base = torch.randn(4, 3, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        tensor = {
            "transposed": base.transpose(0, 3),
            "channels_last": base.to(memory_format=torch.channels_last),
            "strided": base[..., ::2],
        }[shape]
        assert not tensor.is_contiguous()
        p = nn.Parameter(tensor.contiguous() if contiguous else tensor)
        scale = torch.arange(1.0, p.numel() + 1, dtype=torch.float64).reshape(p.shape)
        return p, Problem([p], lambda: (scale * (p - 1) ** 2).sum())

    (p, problem), (q, other) = problem_of(False), problem_of(True)
    ours, theirs = LBFGS([p]), LBFGS([q])
    for _ in range(4):
        ours.step(problem)
        theirs.step(other)
    assert torch.equal(p, q)
    assert ours.counts["iterations"] == 4


def test_complex_weights_are_pairs_of_real_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    z = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.complex128))
    xy = nn.Parameter(torch.view_as_real(z.detach()).clone())
    goal = torch.randn(5, generator=generator, dtype=torch.complex128)
    ours = Problem([z], lambda: ((z - goal).abs() ** 4).sum())
    pairs = Problem([xy], lambda: ((torch.view_as_complex(xy) - goal).abs() ** 4).sum())
    first, second = LBFGS([z]), LBFGS([xy])
    for _ in range(6):
        first.step(ours)
        second.step(pairs)
        torch.testing.assert_close(torch.view_as_real(z.detach()), xy.detach(), rtol=1e-10, atol=1e-12)


def test_sparse_gradients_count_with_their_zeros() -> None:
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(6, 3, sparse=sparse, dtype=torch.float64)
        weight = nn.Parameter(table.weight.detach())
        table.weight = weight
        problem = Problem([weight], lambda: (table(torch.tensor([1, 4, 4])) - 1).square().sum())  # noqa: B023
        optimizer = LBFGS([table.weight])
        for _ in range(3):
            optimizer.step(problem)
        results.append(table.weight.detach().clone())
    assert torch.equal(*results)


def test_iterations_of_one_step_end_by_tolerance_and_by_evaluations() -> None:
    params, problem = regression()
    optimizer = LBFGS(params, max_iter=100, tolerance_change=1e-3)
    optimizer.step(problem)
    assert 1 < optimizer.counts["iterations"] < 30
    assert optimizer.counts["evaluations"] == problem.calls
    params, problem = regression()
    optimizer = LBFGS(params, max_iter=100, max_eval=7, **EXACT)
    optimizer.step(problem)
    assert problem.calls <= 8
    params, problem = regression()
    optimizer = LBFGS(params, max_iter=100, tolerance_grad=1e9)
    before = values(params)
    optimizer.step(problem)
    assert problem.calls == 1
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_a_pair_without_curvature_is_skipped() -> None:
    """Down a hill that gets steeper: s.y is negative, and H must stay positive."""
    x = nn.Parameter(torch.tensor([0.5, 1.0], dtype=torch.float64))
    problem = Problem([x], lambda: -(x**2).sum() + (x**4).sum() / 100)
    optimizer = LBFGS([x], line_search="armijo")
    optimizer.step(problem)
    assert optimizer.counts["skipped_pairs"] == 1
    assert optimizer.state_dict()["state"][0]["order"] == []
    for _ in range(60):
        optimizer.step(problem)
    assert problem.loss().item() == pytest.approx(-50.0)  # each coordinate at sqrt(50)
    picky = LBFGS([x], line_search="armijo", min_curvature=0.999999)
    with torch.no_grad():
        x.copy_(torch.tensor([6.0, 9.0]))
    picky.step(problem)
    assert picky.counts == {"iterations": 1, "evaluations": 2, "skipped_pairs": 1, "failed_searches": 0}


def test_a_stochastic_loss_gives_pairs_of_one_batch() -> None:
    """Each step has a loss of its own: y is the difference of gradients of the same one."""
    params, problem = regression()
    batches = iter(range(100))
    inner = problem.loss
    optimizer = LBFGS(params, lr=0.5)
    for _ in range(10):
        weight = 1 + 0.5 * (next(batches) % 3)
        problem.loss = lambda: weight * inner()  # noqa: B023 # called in this turn
        optimizer.step(problem)
    state = optimizer.state_dict()["state"][0]
    newest = state["order"][-1]
    s, y = state["history"][0, 2 * newest], state["history"][0, 2 * newest + 1]
    assert float(s @ y) > 0
    assert inner().item() < regression()[1].loss().item()
