"""What an optimizer has saved, it loads: options that moved in the middle of a run, slots that rest or are to come."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim import SGD, AdamW, Lion, Muon
from lightning_optim.optimizers.base import RuleOptimizer

from .common import assert_same, contents, known_warnings

pytestmark = known_warnings

SWITCHED: dict[str, tuple[Callable[[Any], RuleOptimizer], torch.dtype, list[dict[str, Any]]]] = {
    "amsgrad on": (AdamW, torch.float32, [{"amsgrad": True}]),
    "amsgrad on and off": (AdamW, torch.float32, [{"amsgrad": True}, {"amsgrad": False}]),
    "amsgrad off and on": (lambda p: AdamW(p, amsgrad=True), torch.float32, [{"amsgrad": False}, {"amsgrad": True}]),
    "momentum on": (lambda p: SGD(p, lr=0.1), torch.float32, [{"momentum": 0.9}]),
    "momentum on, kahan": (lambda p: SGD(p, lr=0.1, rounding="kahan"), torch.bfloat16, [{"momentum": 0.9}]),
    "momentum on, stochastic": (
        lambda p: SGD(p, lr=0.1, rounding="stochastic"),
        torch.bfloat16,
        [{"momentum": 0.9, "dampening": 0.5}],
    ),
    "momentum off and on": (
        lambda p: SGD(p, lr=0.1, momentum=0.9),
        torch.float32,
        [{"momentum": 0.0}, {"momentum": 0.9}],
    ),
    "nesterov on": (lambda p: SGD(p, lr=0.1, momentum=0.9), torch.float32, [{"nesterov": True}]),
    "to Muon": (lambda p: Muon([{"params": p, "use_muon": False}]), torch.float32, [{"use_muon": True}]),
    "to AdamW": (lambda p: Muon([{"params": p, "use_muon": True}]), torch.float32, [{"use_muon": False}]),
    "to Muon and back": (
        lambda p: Muon([{"params": p, "use_muon": False}]),
        torch.float32,
        [{"use_muon": True}, {"use_muon": False}],
    ),
    "decay and caution": (Lion, torch.float32, [{"weight_decay": 0.5, "cautious": True}]),
}


def step(optimizer: torch.optim.Optimizer, number: int) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.linspace(-1, number, p.numel()).view(p.shape).to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize("case", SWITCHED)
@pytest.mark.parametrize("when", ["before", "after"], ids=lambda when: f"saved {when} the step")
def test_switched_on_or_off_in_mid_run(case: str, when: str) -> None:
    """Saved right after each change, and after the step that follows: a resumed run is the straight one."""
    build, dtype, changes = SWITCHED[case]
    p = nn.Parameter(torch.linspace(-1, 1, 9).view(3, 3).to(dtype))
    optimizer = build([p])
    step(optimizer, 0)
    for number, change in enumerate(changes, start=1):
        optimizer.param_groups[0].update(change)
        if when == "after":
            step(optimizer, number)
        q = nn.Parameter(p.detach().clone())
        again = build([q])
        again.load_state_dict(contents(optimizer))
        assert_same(contents(again), contents(optimizer))
        for further in (number + 1, number + 2):
            for each_one in (optimizer, again):
                step(each_one, further)
        assert_same(q.detach(), p.detach())
        assert_same(contents(again), contents(optimizer))


def test_half_a_state_is_not_ones_own() -> None:
    """What no step would make of zeros must be there, of each rule of which something is there."""
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = Muon([{"params": [p], "use_muon": False}])
    step(optimizer, 0)
    optimizer.param_groups[0]["use_muon"] = True
    for gone in ("exp_avg", "exp_avg_sq", "step"):
        saved = contents(optimizer)
        del saved["state"][0][gone]
        with pytest.raises(ValueError, match="Muon: parameter 0: .*damaged.*this one needs .*" + gone):
            optimizer.load_state_dict(saved)
    for kept in ("step", "kahan_compensation"):
        saved = contents(AdamW([p]))
        saved["state"][0] = {kept: torch.ones(3, 3) if kept != "step" else torch.tensor(1.0)}
        with pytest.raises(ValueError, match=r"AdamW: parameter 0: .*this one needs .*exp_avg"):
            AdamW([p]).load_state_dict(saved)


def test_frozen_parameters_and_those_without_a_step() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = AdamW(params)
    step(optimizer, 0)
    params[1].requires_grad_(False)
    params[1].grad = None
    late = nn.Parameter(torch.ones(4))
    optimizer.add_param_group({"params": [late], "lr": 0.3})
    saved = contents(optimizer)
    fresh = [nn.Parameter(p.detach().clone()) for p in (*params, late)]
    other = AdamW([{"params": fresh[:3]}, {"params": fresh[3:]}])
    other.load_state_dict(saved)
    assert_same(contents(other), saved)
    with pytest.raises(ValueError, match=r"\[3, 1\] parameters, this optimizer has \[3\]"):
        AdamW(params).load_state_dict(saved)


def test_tensors_are_its_own_and_groups_no_twins() -> None:
    """One tensor for two slots, two parameters, two groups; one dict for two groups."""
    p, q = (nn.Parameter(torch.ones(2)) for _ in "pq")
    optimizer = AdamW([{"params": [p]}, {"params": [q]}], lr=torch.tensor(0.1))
    step(optimizer, 0)
    saved = contents(optimizer)
    shared = torch.full((1,), 0.5).expand(2)
    for state in saved["state"].values():
        state.update(exp_avg=shared, exp_avg_sq=shared)
    saved["param_groups"][1] = group = saved["param_groups"][0] | {"params": [1]}
    saved["param_groups"][0]["lr"] = group["lr"] = torch.tensor(0.2)
    optimizer.load_state_dict(saved)
    moments = [optimizer.state[x][slot] for x in (p, q) for slot in ("exp_avg", "exp_avg_sq")]
    assert len({moment.data_ptr() for moment in moments}) == 4
    assert all(moment.stride() == (1,) for moment in moments)
    first, second = optimizer.param_groups
    assert first is not second
    assert first["lr"] is not second["lr"]
    saved["param_groups"][1] = saved["param_groups"][0]
    with pytest.raises(ValueError, match="a parameter is twice in the saved param groups"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("step_count", "message"),
    [
        (-1, "step=-1"),
        (2.5, "step=2.5"),
        (True, "step=True"),
        ("3", "step='3'"),
        (1j, "step=1j"),
        (10**400, "step=1000"),
        (torch.ones(2), "step=tensor"),
        (torch.empty((), device="meta"), "step=tensor"),
        (float("inf"), "step=inf"),
    ],
)
def test_steps_that_are_no_numbers_of_steps(step_count: Any, message: str) -> None:
    optimizer = AdamW([nn.Parameter(torch.ones(2))])
    step(optimizer, 0)
    saved = contents(optimizer)
    saved["state"][0]["step"] = step_count
    before = contents(optimizer)
    with pytest.raises(ValueError, match=f"AdamW: parameter 0: {message}"):
        optimizer.load_state_dict(saved)
    assert_same(contents(optimizer), before)


def test_loaded_in_any_mode_it_can_step() -> None:
    optimizer = AdamW([nn.Parameter(torch.ones(2))], lr=torch.tensor(0.1))
    step(optimizer, 0)
    saved, expected = contents(optimizer), copy.deepcopy(optimizer)
    step(expected, 1)
    with torch.inference_mode():
        optimizer.load_state_dict(copy.deepcopy(saved))
    with torch.device("meta"):
        optimizer.load_state_dict(saved)
    step(optimizer, 1)
    assert_same(contents(optimizer), contents(expected))


def test_a_slip_in_a_saved_options_name_is_refused() -> None:
    optimizer = AdamW([nn.Parameter(torch.ones(2))], amsgrad=True)
    saved = contents(optimizer)
    group = saved["param_groups"][0]
    group["amsgard"] = group.pop("amsgrad")
    with pytest.raises(ValueError, match="saved param group 0 has 'amsgard', and no 'amsgrad'"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("saved", [None, [], 3, "state"])
def test_what_is_no_state_dict_at_all(saved: Any) -> None:
    with pytest.raises(TypeError, match="AdamW: a state_dict that is a"):
        AdamW([nn.Parameter(torch.ones(2))]).load_state_dict(saved)


def test_muons_groups_say_how_they_are_stepped() -> None:
    optimizer = Muon([{"params": [nn.Parameter(torch.ones(2, 2))], "use_muon": True}])
    for value in (None, "yes", 1, torch.ones(2)):
        saved = contents(optimizer)
        saved["param_groups"][0]["use_muon"] = value
        with pytest.raises((ValueError, TypeError), match="use_muon="):
            optimizer.load_state_dict(saved)
    del saved["param_groups"][0]["use_muon"]
    with pytest.raises(ValueError, match="has no use_muon"):
        optimizer.load_state_dict(saved)


def test_sgd_without_momentum_keeps_no_state() -> None:
    p = nn.Parameter(torch.ones(2))
    for engine in ("eager", "foreach", "host"):
        optimizer = SGD([p], lr=0.1, engine=engine)
        step(optimizer, 0)
        step(optimizer, 1)
        assert not optimizer.state
        assert optimizer.state_dict()["state"] == {}
