"""Parameters: which are trained, in which groups."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

import lightning_optim
from lightning_optim.cli.configure import ParamGroupOptions

from .common import fit, known_warnings, optimizer_of

pytestmark = known_warnings


def test_without_flags_there_is_one_group() -> None:
    (group,) = optimizer_of(fit("--optimizer=AdamW", "--optimizer.weight_decay=0.3")).param_groups
    assert group["weight_decay"] == 0.3


def test_groups_take_the_optimizers_own_values_unless_told() -> None:
    arguments = ["--optimizer=AdamW", "--optimizer.lr=0.5", "--optimizer.weight_decay=0.3"]
    groups = optimizer_of(fit(*arguments, "--param_groups.no_decay=['layers.2.weight']")).param_groups
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [("decay", 0.5, 0.3), ("no_decay", 0.5, 0)]
    assert [len(g["params"]) for g in groups] == [1, 5]
    groups = optimizer_of(fit(*arguments, "--param_groups.weight_decay=0.1")).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0]
    override = '--param_groups.overrides={"layers.2.*": {"lr": 0.001}}'
    groups = optimizer_of(fit(*arguments, override, "--param_groups.layer_decay=0.5")).param_groups
    assert [g["lr"] for g in groups] == [0.125, 0.125, 0.25, 0.001, 0.001], "an override is not multiplied"


def test_groups_for_an_optimizer_without_weight_decay(capsys: pytest.CaptureFixture[str]) -> None:
    groups = optimizer_of(fit("--optimizer=Rprop", "--param_groups={}")).param_groups
    assert len(groups) == 2
    assert all("weight_decay" not in group for group in groups)
    with pytest.raises(ValueError, match=r"Rprop has no weight_decay"):
        fit("--optimizer=Rprop", "--param_groups.weight_decay=0.1")


def test_the_flags_are_the_arguments_of_the_function() -> None:
    function = set(inspect.signature(lightning_optim.param_groups).parameters) - {
        "model",
        "lr",
        "kinds",
    }  # the optimizer's
    assert {field.name for field in dataclasses.fields(ParamGroupOptions)} == function


@pytest.mark.parametrize("groups", [[], ["--param_groups={}"]])
def test_layers_of_configure_model_are_trained(groups: list[str]) -> None:
    cli = fit("--optimizer=SGD", "--optimizer.lr=0.1", *groups, model="LateModel")
    optimized = {id(p) for group in optimizer_of(cli).param_groups for p in group["params"]}
    assert optimized == {id(p) for p in cli.model.parameters()}
    assert len(optimized) == 6
