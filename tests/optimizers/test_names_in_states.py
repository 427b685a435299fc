"""Where both sides know names, a saved parameter is the one of that name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import lightning_optim
from lightning_optim import LBFGS, SAM, AdamW

from .common import assert_same, contents, each, known_warnings, make

pytestmark = known_warnings

GRADIENTS = {"a": 1.0, "b": -5.0, "c": 2.0}


def model(order: str) -> nn.ModuleDict:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(3, 3, generator=generator) for name in sorted(order)}
    layers = {name: nn.Linear(3, 3, bias=False) for name in order}
    for name, layer in layers.items():
        layer.weight.data = weights[name].clone()
    return nn.ModuleDict(layers)


def step(optimizer: torch.optim.Optimizer, layers: nn.ModuleDict) -> None:
    def closure() -> Tensor:
        for name, layer in layers.items():
            layer.weight.grad = torch.full((3, 3), GRADIENTS[name])
        return torch.ones(())

    if isinstance(optimizer, SAM):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def check_moments(
    a: torch.optim.Optimizer, left: nn.ModuleDict, b: torch.optim.Optimizer, right: nn.ModuleDict
) -> None:
    for name in left:
        ours, theirs = a.state[left.get_parameter(f"{name}.weight")], b.state[right.get_parameter(f"{name}.weight")]
        assert ours.keys() == theirs.keys()
        for slot in ours:
            torch.testing.assert_close(ours[slot], theirs[slot], rtol=0, atol=0)


SAMS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sam": partial(SAM, base=AdamW),
    "sam of torch": partial(SAM, base=torch.optim.AdamW),
}


@pytest.mark.parametrize("name", ["adam", "adamw", "lamb", "lion", "muon", "sgd", *SAMS])
@pytest.mark.parametrize("groups", [1, 2])
def test_another_order_of_definition_is_matched_by_name(name: str, groups: int) -> None:
    def build(layers: nn.ModuleDict) -> torch.optim.Optimizer:
        given: list[Any] = list(layers.named_parameters())
        if groups == 2:  # in which the order differs as well
            rest = [pair for pair in given if pair[0] != "c.weight"]
            given = [{"params": rest, "lr": 0.3}, {"params": [pair for pair in given if pair[0] == "c.weight"]}]
        return SAMS[name](given) if name in SAMS else make(name, given)

    old, new = model("abc"), model("bca")
    optimizer, other = build(old), build(new)
    step(optimizer, old)
    saved = contents(optimizer)
    other.load_state_dict(saved)
    check_moments(other, new, optimizer, old)
    if name not in SAMS or name == "sam":
        assert [g["param_names"] for g in other.param_groups] == [g["param_names"] for g in build(new).param_groups]
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]
    # And back: what it saves now is known by its own names.
    again = build(old)
    again.load_state_dict(other.state_dict())
    check_moments(again, old, optimizer, old)
    assert_same({k: v for k, v in contents(again).items() if k == "state"}, {"state": saved["state"]})


def test_names_that_do_not_match_are_listed() -> None:
    optimizer = AdamW(model("ab").named_parameters())
    saved = optimizer.state_dict()
    other = AdamW(model("ac").named_parameters())
    before = contents(other)
    with pytest.raises(ValueError, match=r"it lacks 'c.weight'; it has 'b.weight', which this optimizer has not"):
        other.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"it lacks 'c.weight'"):
        AdamW(model("abc").named_parameters()).load_state_dict(saved)
    assert_same(contents(other), before)
    del saved["param_groups"][0]["param_names"]
    other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == ["a.weight", "c.weight"]


def test_a_name_that_moved_to_another_group_is_refused() -> None:
    """Options and schedules go by the groups' places: nobody could say which learning rate was meant."""

    def build(first: str, second: str) -> AdamW:
        layers = model("ab")
        named = dict(layers.named_parameters())
        return AdamW([{"params": [(name, named[name])], "lr": lr} for name, lr in ((first, 0.1), (second, 0.2))])

    saved = build("a.weight", "b.weight").state_dict()
    with pytest.raises(ValueError, match=r"changed their param group: 'a.weight' \(from group 0 to 1\), 'b.weight'"):
        build("b.weight", "a.weight").load_state_dict(saved)
    with pytest.raises(ValueError, match="it has 2 param groups, this optimizer 1"):
        AdamW(model("ab").named_parameters()).load_state_dict(saved)


def test_what_wrappers_put_into_names_does_not_count() -> None:
    layers, wrapped = model("ab"), model("ba")
    optimizer = AdamW(layers.named_parameters())
    step(optimizer, layers)
    names = [f"module._orig_mod.{name}" for name, _ in wrapped.named_parameters()]
    other = AdamW(zip(names, wrapped.parameters(), strict=True))
    other.load_state_dict(optimizer.state_dict())
    check_moments(other, wrapped, optimizer, layers)
    assert other.param_groups[0]["param_names"] == names


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_torchs_named_states_are_matched_too(cls: Any) -> None:
    old, new = model("ab"), model("ba")
    theirs = cls(old.named_parameters(), **({"momentum": 0.9} if cls is torch.optim.SGD else {}))
    step(theirs, old)
    ours = getattr(lightning_optim, cls.__name__)(new.named_parameters())
    ours.load_state_dict(theirs.state_dict())
    check_moments(ours, new, theirs, old)


def test_names_survive_an_optimizer_without() -> None:
    """As in torch, such an optimizer takes them over."""
    layers = model("ab")
    nameless = AdamW(layers.parameters())
    nameless.load_state_dict(AdamW(layers.named_parameters()).state_dict())
    assert nameless.state_dict()["param_groups"][0]["param_names"] == ["a.weight", "b.weight"]


def test_names_that_are_there_twice_tell_nothing() -> None:
    a, b = (nn.Parameter(torch.ones(2)) for _ in "ab")
    saved = AdamW([("w", a), ("w", b)]).state_dict()
    AdamW([("w", a), ("w", b)]).load_state_dict(saved)
    mixed = AdamW([("v", a), ("w", b)])
    with pytest.raises(ValueError, match="it lacks 'v'"):
        mixed.load_state_dict(saved)
    third = [nn.Parameter(torch.ones(2)) for _ in "abc"]
    saved = AdamW(zip("vww", third, strict=True)).state_dict()
    with pytest.raises(ValueError, match=r"names that are there twice: 'w'"):
        AdamW(zip("wvw", third, strict=True)).load_state_dict(saved)


def test_damaged_names_are_refused() -> None:
    optimizer = AdamW(model("ab").named_parameters())
    for names in (["a.weight"], "ab", [1, 2], {"a": 1}):
        saved = contents(optimizer)
        saved["param_groups"][0]["param_names"] = names
        with pytest.raises(ValueError, match=r"group 0 has param_names=.*valid: a list with the name of each"):
            optimizer.load_state_dict(saved)


def test_a_history_does_not_follow_its_parameters() -> None:
    """L-BFGS's vectors go through all of them in their order."""
    old, new = model("ab"), model("ba")
    optimizer, other = LBFGS(old.named_parameters()), LBFGS(new.named_parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == ["b.weight", "a.weight"]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (old["b"](old["a"](torch.ones(2, 3))) - 1).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = contents(other)
    with pytest.raises(ValueError, match="LBFGS: the saved history is of the same parameters in another order"):
        other.load_state_dict(optimizer.state_dict())
    assert_same(contents(other), before)


@each
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoints_of_another_order(name: str, flat: bool) -> None:
    """These have the names for numbers, and bring the numbers into order, but not ``param_names``."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    old, new = model("ab"), model("ba")
    optimizer, other = make(name, old.named_parameters()), make(name, new.named_parameters())
    step(optimizer, old)
    saved = get_optimizer_state_dict(old, optimizer, options=options)
    set_optimizer_state_dict(new, other, copy.deepcopy(saved), options=options)
    check_moments(other, new, optimizer, old)
    if not flat:
        direct = make(name, new.named_parameters())
        direct.load_state_dict(saved)
        check_moments(direct, new, optimizer, old)
