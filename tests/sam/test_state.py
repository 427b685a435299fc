"""What SAM has in common with the optimizer inside, and what is saved."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import lightning_optim
from lightning_optim.optimizers.sam import SAM

from .common import BASES, closure_of, loss_of, network, train, weights

EACH = pytest.mark.parametrize("name", BASES)


def saved(optimizer: torch.optim.Optimizer) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    assert all(torch.equal(p, q) for p, q in zip(weights(a), weights(b), strict=True))


@EACH
def test_it_is_one_with_the_base(name: str) -> None:
    net = network()
    optimizer = SAM(net.parameters(), BASES[name])
    for attribute in ("param_groups", "state", "defaults"):
        assert getattr(optimizer, attribute) is getattr(optimizer.base, attribute)
    train(net, optimizer, range(2))
    optimizer.load_state_dict(saved(optimizer))
    copied = copy.deepcopy(optimizer)
    for one in (optimizer, copied):
        for attribute in ("param_groups", "state", "defaults"):
            assert getattr(one, attribute) is getattr(one.base, attribute)
    assert copied.base is not optimizer.base
    optimizer.param_groups = list(optimizer.param_groups)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer.step, type(net.forward))


@EACH
def test_a_run_that_is_resumed_gives_the_same_bits(name: str) -> None:
    straight, first = network(), network()
    train(straight, SAM(straight.parameters(), BASES[name], rho=0.3), range(6))
    half = SAM(first.parameters(), BASES[name], rho=0.3)
    train(first, half, range(3))
    second = network()
    second.load_state_dict(first.state_dict())
    rest = SAM(second.parameters(), BASES[name], rho=0.9, adaptive=True)
    rest.load_state_dict(saved(half))
    assert {group["sam_rho"] for group in rest.param_groups} == {0.3}
    assert not any(group["sam_adaptive"] for group in rest.param_groups)
    train(second, rest, range(3, 6))
    assert_same_weights(second, straight)


@EACH
def test_state_goes_to_the_base_and_back(name: str) -> None:
    net = network()
    optimizer = SAM(net.parameters(), BASES[name], rho=0.3)
    train(net, optimizer, range(2))
    base = BASES[name](network().parameters())
    base.load_state_dict(saved(optimizer))
    again = SAM(net.parameters(), BASES[name], rho=0.7)
    again.load_state_dict(saved(base))  # with what SAM left in its groups
    assert again.param_groups[0]["sam_rho"] == 0.3
    plain = saved(base)
    for group in plain["param_groups"]:
        del group["sam_rho"], group["sam_adaptive"]
    again = SAM(net.parameters(), BASES[name], rho=0.7)
    again.load_state_dict(plain)
    assert again.param_groups[0]["sam_rho"] == 0.7
    assert plain["state"].keys() == again.state_dict()["state"].keys()


def test_hooks_of_state() -> None:
    net = network()
    optimizer = SAM(net.parameters(), BASES["torch SGD"])
    called: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda *_: called.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "more"})
    optimizer.register_load_state_dict_post_hook(lambda *_: called.append("loaded"))
    optimizer.register_step_pre_hook(lambda *_: called.append("before the step"))
    optimizer.register_step_post_hook(lambda *_: called.append("stepped"))
    state = optimizer.state_dict()
    assert state["more"] == 1
    optimizer.load_state_dict(state)
    train(net, optimizer, range(1))
    assert called == ["before saving", "loaded", "before the step", "stepped"]


def test_schedules_move_the_base() -> None:
    net = network()
    optimizer = SAM(net.parameters(), BASES["ours"])
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lightning_optim.Linear(optimizer, total_steps=4, warmup_steps=0),
    ]
    for step in range(2):
        optimizer.step(closure_of(optimizer, net, step))
        schedules[0].step()
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0.05 / 3)


@EACH
def test_distributed_checkpoints(name: str) -> None:
    """Their functions make a first step of their own, with a learning rate of zero, to allocate the state."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    net, fresh = network(), network()
    optimizer = SAM(net.parameters(), BASES[name], rho=0.3)
    train(net, optimizer, range(3))
    state = copy.deepcopy(get_optimizer_state_dict(net, optimizer))  # torch's own would share its tensors
    fresh.load_state_dict(net.state_dict())
    other = SAM(fresh.parameters(), BASES[name], rho=0.3)
    set_optimizer_state_dict(fresh, other, state)
    assert_same_weights(fresh, net)
    train(net, optimizer, range(3, 5))
    train(fresh, other, range(3, 5))
    assert_same_weights(fresh, net)


def test_where_it_is_in_its_step_is_known_to_lightnings_wrapper() -> None:
    """Which reads attributes of the optimizer, and keeps those that are set to itself."""
    from lightning.pytorch.core.optimizer import LightningOptimizer

    net = network()
    optimizer = SAM(net.parameters(), BASES["torch SGD"])
    wrapper: Any = LightningOptimizer(optimizer)
    loss_of(net, 0).backward()
    old = weights(net)
    wrapper.perturb()
    assert not torch.equal(weights(net)[0], old[0])
    with pytest.raises(RuntimeError, match="perturbed"):
        optimizer.step()
    wrapper.restore()
    assert torch.equal(weights(net)[0], old[0])
    assert wrapper.param_groups is optimizer.base.param_groups
    optimizer.step()


def test_a_base_made_by_a_function_of_ones_own() -> None:
    def make(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)

    net = network()
    train(net, SAM(net.named_parameters(), make), range(1))
    assert lightning_optim.create_optimizer("sam", net.parameters(), base=make, rho=0.2).param_groups[0]["lr"] == 0.1


def test_the_registry_splits_a_module_as_the_base_would_have_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    base = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3)
    optimizer = lightning_optim.create_optimizer("sam", model, base=base, rho=0.2)
    assert [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [(0.3, 0.1), (0.0, 0.1)]
    muon = lightning_optim.create_optimizer("sam", model, base=partial(lightning_optim.Muon, lr=0.02))
    assert [group["name"] for group in muon.param_groups] == ["decay.muon", "no_decay.adamw"]
    with pytest.raises(TypeError, match=r"sam of a module, with base=.*whose options are not known; valid"):
        lightning_optim.create_optimizer("sam", model, base=lambda params: torch.optim.SGD(params, lr=0.1))
