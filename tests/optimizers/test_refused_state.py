"""What is not this optimizer's state is refused, and changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import references
import torch
from torch import Tensor

from lightning_optim.registry import OPTIMIZERS

from .common import assert_same, contents, each, known_warnings, make, one_group, parameters, train, weights

pytestmark = known_warnings


def _no(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved.pop(key)


def _damage(slot: str | None, value: Any) -> Callable[[dict[str, Any]], None]:
    """Replace one value of the first parameter's state (``None``: its first slot)."""

    def damage(saved: dict[str, Any]) -> None:
        state = saved["state"][0]
        key = slot or next(k for k in state if k != "step")
        if value is _no:
            del state[key]
        elif callable(value):
            state[key] = value(state[key])
        else:
            state[key] = value

    return damage


def _regroup(groups: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved.update(param_groups=groups(saved["param_groups"]))


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no param_groups": (_no("param_groups"), "no 'param_groups'"),
    "no state": (_no("state"), "no 'state'"),
    "a slot is missing": (_damage(None, _no), "parameter 0: .* damaged"),
    "a slot too many": (_damage("fancy", torch.zeros(7, 5)), "parameter 0: .*fancy"),
    "a wrong shape": (_damage(None, torch.zeros(5, 7)), r"parameter 0: .*\(5, 7\).*\(7, 5\)"),
    "no tensor": (_damage(None, "zeros"), "parameter 0: .*str"),
    "a slot of integers": (_damage(None, Tensor.long), "parameter 0: .*int64"),
    "step is NaN": (_damage("step", torch.tensor(float("nan"))), "parameter 0: step=nan"),
    "step is negative": (_damage("step", -1), "parameter 0: step=-1"),
    "step is a word": (_damage("step", "three"), "parameter 0: step='three'"),
    "step is a vector": (_damage("step", torch.ones(2)), "parameter 0: step="),
    "state of no dict": (lambda saved: saved["state"].update({0: torch.zeros(7, 5)}), "parameter 0: .*Tensor"),
    "states of no dict": (lambda saved: saved.update(state=[1]), "'state'.*list"),
    "groups of no list": (_regroup(lambda groups: {"lr": 1}), "param group"),
    "a group too many": (_regroup(lambda groups: [*groups, groups[0]]), r"\[4, 4\] parameters.*\[4\]"),
    "no group": (_regroup(lambda groups: []), r"\[\] parameters.*\[4\]"),
    "too few parameters": (_regroup(lambda groups: [groups[0] | {"params": [0, 1]}]), r"\[2\] parameters.*\[4\]"),
    "no params": (_regroup(lambda groups: [{k: v for k, v in groups[0].items() if k != "params"}]), "param"),
    "no lr": (_regroup(lambda groups: [{k: v for k, v in groups[0].items() if k != "lr"}]), "has no lr"),
    "a negative lr": (_regroup(lambda groups: [groups[0] | {"lr": -1.0}]), "lr=-1.0"),
    "an lr of no number": (_regroup(lambda groups: [groups[0] | {"lr": "fast"}]), "lr='fast'"),
    "a parameter twice": (_regroup(lambda groups: [groups[0] | {"params": [0, 1, 2, 2]}]), "twice"),
}


@references.common_to_all
@each
@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_state_is_refused_and_changes_nothing(name: str, fault: str) -> None:
    source, target = one_group(name, parameters()), one_group(name, parameters(1))
    train(source, range(2))
    train(target, range(3))
    saved = contents(source)
    damage, message = FAULTS[fault]
    if fault.startswith("step") and "step" not in saved["state"][0]:
        pytest.skip("counts no steps")
    if fault == "a slot is missing" and len(saved["state"][0]) == 1:
        pytest.skip("without its only slot, it looks like a parameter without steps")
    damage(saved)
    before, before_weights = contents(target), weights(target.param_groups[0]["params"])
    with pytest.raises((ValueError, TypeError), match=message):
        target.load_state_dict(saved)
    assert_same(contents(target), before)
    assert_same(weights(target.param_groups[0]["params"]), before_weights)
    train(target, [3])
    assert target.engine_report()


def _same_kind(a: str, b: str) -> bool:
    """Adam and AdamW: one rule, whose state either can go on with; and that of RAdam, which is the same and less."""
    return OPTIMIZERS[a].cls.rule is OPTIMIZERS[b].cls.rule or (a == "radam" and b in ("adam", "adamw"))


@pytest.mark.matrix(
    unless=lambda source, target: references.representative(source) and references.representative(target)
)
@pytest.mark.parametrize(
    ("source", "target"), [pair for pair in itertools.permutations(sorted(OPTIMIZERS), 2) if not _same_kind(*pair)]
)
@pytest.mark.parametrize("steps", [0, 2], ids=["empty", "stepped"])
def test_state_of_another_optimizer_is_refused(source: str, target: str, steps: int) -> None:
    """Also when the slots have the same names, and also before there are any."""
    theirs, ours = one_group(source, parameters()), one_group(target, parameters())
    train(theirs, range(steps))
    train(ours, range(1))
    before = contents(ours)
    with pytest.raises(ValueError, match=rf"(?i)^{target}: .*another optimizer"):
        ours.load_state_dict(theirs.state_dict())
    assert_same(contents(ours), before)


@pytest.mark.parametrize(
    ("source", "target"), [pair for pair in itertools.permutations(sorted(OPTIMIZERS), 2) if _same_kind(*pair)]
)
def test_state_of_the_same_rule_is_taken(source: str, target: str) -> None:
    theirs, params = make(source, parameters()), parameters()
    train(theirs, range(2))
    ours = make(target, params)
    ours.load_state_dict(theirs.state_dict())
    assert_same(contents(ours)["state"], contents(theirs)["state"])
    train(ours, [2])


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("stranger", ["Adagrad", "RMSprop", "Adadelta", "Rprop", "NAdam", "Adamax", "ASGD"])
def test_state_of_torchs_other_optimizers_is_refused(name: str, stranger: str) -> None:
    # All but RAdam, whose options and state are Adam's, and mean the same.
    if getattr(torch.optim, stranger) is OPTIMIZERS[name].torch_equivalent:
        pytest.skip("no stranger")
    theirs = getattr(torch.optim, stranger)(parameters())
    train(theirs, range(2))
    with pytest.raises(ValueError, match="another optimizer"):
        one_group(name, parameters()).load_state_dict(theirs.state_dict())
