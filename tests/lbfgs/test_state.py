"""Checkpoints: bit-exact resume, what is refused, torch's history, copies of the optimizer."""

from __future__ import annotations

import copy
import pickle  # what `torch.save(optimizer)` and spawned processes use
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import LBFGS, SGD, AdamW, Lion

from .common import Problem, regression, rosenbrock, start, state_copy, values

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "armijo": {"line_search": "armijo"},
    "no search": {"line_search": None, "lr": 0.1},
    "reused": {"reuse_evaluation": True},
    "several": {"max_iter": 3},
    "short": {"history_size": 2},
    "decay": {"weight_decay": 0.1, "reuse_evaluation": True},
    "noise": {"noise": "auto"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_to_the_bit(variant: str, dtype: torch.dtype) -> None:
    """Through a file with ``weights_only=True``, into new parameters, at every step."""
    options = VARIANTS[variant]
    (straight, problem), (resumed, other) = regression(dtype), regression(dtype)
    optimizer, again = LBFGS(straight, **options), LBFGS(resumed, **options)
    for _ in range(7):
        optimizer.step(problem)
        again.step(other)
        for p, q in zip(straight, resumed, strict=True):
            assert torch.equal(p, q)
        assert optimizer.counts == again.counts
        assert problem.calls == other.calls
        state, kept, calls = state_copy(again), values(resumed), other.calls
        resumed, other = regression(dtype)
        other.calls = calls
        again = LBFGS(resumed, **options)
        if variant == "reused":  # either order
            again.load_state_dict(state)
        for index, old in enumerate(kept):
            resumed[index].data.copy_(old)
        again.load_state_dict(state)


def test_the_state_owns_its_tensors_after_loading() -> None:
    params, problem = regression()
    optimizer = LBFGS(params)
    optimizer.step(problem)
    state = optimizer.state_dict()
    other, other_problem = regression()
    second = LBFGS(other)
    second.load_state_dict(state)
    before = copy.deepcopy(state["state"][0]["history"])
    for _ in range(3):
        second.step(other_problem)
    assert torch.equal(before, optimizer.state_dict()["state"][0]["history"])


def test_a_fresh_state() -> None:
    params, problem = regression()
    optimizer = LBFGS(params)
    fresh = optimizer.state_dict()
    assert fresh["state"] == {}
    optimizer.step(problem)
    optimizer.load_state_dict(fresh)
    assert optimizer.state_dict()["state"] == {}


def test_only_tensors_and_primitives() -> None:
    params, problem = regression(torch.bfloat16)
    groups: list[dict[str, Any]] = [{"params": params[:2], "lr": 0.5}, {"params": params[2:]}]
    optimizer = LBFGS(groups, reuse_evaluation=True)
    optimizer.step(problem)
    kinds: set[type] = set()

    def walk(value: Any) -> None:
        kinds.add(type(value))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(item)

    walk(optimizer.state_dict())
    assert kinds <= {dict, list, int, float, bool, str, type(None), Tensor}
    assert optimizer.state_dict()["state"][0]["history"].device.type == "cpu"
    assert optimizer.state == {}, "frameworks move what is there to the weights' device"


def test_options_of_groups_come_with_the_state() -> None:
    params, problem = regression()
    groups: list[dict[str, Any]] = [{"params": params[:1], "lr": 0.25}, {"params": params[1:]}]
    optimizer = LBFGS(groups)
    optimizer.step(problem)
    other = LBFGS([{"params": params[:1]}, {"params": params[1:]}])
    other.load_state_dict(state_copy(optimizer))
    assert [group["lr"] for group in other.param_groups] == [0.25, 1.0]


@pytest.mark.parametrize("make", [SGD, AdamW, Lion, torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_other_optimizers_states_are_refused_both_ways(make: Any) -> None:
    params, problem = regression()
    optimizer, other = LBFGS(params), make(params, lr=0.1)
    optimizer.step(problem)
    problem()
    other.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"LBFGS: .*the state of another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    assert torch.equal(before["state"][0]["history"], optimizer.state_dict()["state"][0]["history"])
    assert before["param_groups"] == optimizer.state_dict()["param_groups"]
    if make in (SGD, AdamW, Lion):
        with pytest.raises(ValueError, match="the state of another optimizer"):
            other.load_state_dict(optimizer.state_dict())


def test_other_parameters_and_damage_are_refused() -> None:
    params, problem = regression()
    optimizer = LBFGS(params)
    for _ in range(2):
        optimizer.step(problem)
    good = state_copy(optimizer)
    with pytest.raises(ValueError, match=r"for param groups of \[4\] parameters, this optimizer has \[3\]"):
        LBFGS(params[:3]).load_state_dict(good)
    wider, _ = regression(shapes=((5, 4), (4,), (), (0, 2)))
    with pytest.raises(ValueError, match=r"of \[\[15, 4, 1\]\] elements, this optimizer has \[\[20, 4, 1\]\]"):
        LBFGS(wider).load_state_dict(good)
    for key, message in (
        ("order", "lacks order"),
        ("noise", "lacks noise"),
        ("sizes", "for trained parameters of None"),
    ):
        broken = copy.deepcopy(good)
        del broken["state"][0][key]
        with pytest.raises(ValueError, match=f"LBFGS: .*{message}"):
            LBFGS(params).load_state_dict(broken)
    with pytest.raises(ValueError, match="no 'state'"):
        LBFGS(params).load_state_dict({"param_groups": good["param_groups"]})


@pytest.mark.parametrize("history_size", [5, 10, 30])
def test_torchs_history_is_taken_over(history_size: int) -> None:
    """The next direction is that of all pairs that torch has, or of the newest that fit."""
    params, problem = regression()
    theirs = torch.optim.LBFGS(params, lr=0.1, history_size=20, max_iter=12, tolerance_change=0.0)
    theirs.step(problem)
    ours = LBFGS(params, history_size=history_size, line_search=None)
    ours.load_state_dict(state_copy(theirs))
    assert ours.param_groups[0]["lr"] == 0.1
    assert set(ours.param_groups[0]) <= {"params", "lr", "weight_decay"}
    pairs = theirs.state[params[0]]
    from .common import two_loop

    problem()
    gradient = torch.cat([p.grad.reshape(-1) for p in params if p.grad is not None])
    known = list(zip(pairs["old_stps"], pairs["old_dirs"], strict=True))[-history_size:]
    expected = 0.1 * two_loop(gradient, known)
    before = torch.cat([p.detach().reshape(-1) for p in params])
    ours.step(problem)
    moved = torch.cat([p.detach().reshape(-1) for p in params]) - before
    assert (moved - expected).norm() <= 1e-10 * expected.norm()


def test_torchs_history_of_other_parameters_is_refused() -> None:
    params, problem = regression()
    theirs = torch.optim.LBFGS(params, max_iter=5)
    theirs.step(problem)
    params[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"vectors of 20 elements, the trained parameters have 5 .torch counts frozen"):
        LBFGS(params).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(how: str) -> None:
    x = start(12)
    problem = Problem([x], lambda: rosenbrock(x))
    optimizer = LBFGS([x])
    for _ in range(4):
        optimizer.step(problem)
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))  # noqa: S301
    (y,) = twin.param_groups[0]["params"]
    assert isinstance(y, nn.Parameter)
    other = Problem([y], lambda: rosenbrock(y))
    for _ in range(4):
        optimizer.step(problem)
        twin.step(other)
        assert torch.equal(x, y)
    assert y is not x


def test_hooks_of_torch_are_called() -> None:
    params, problem = regression()
    optimizer = LBFGS(params)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append("to load"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    optimizer.step(problem)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saved", "to load", "loaded"]
