"""Which parameters are matrices, how groups are split, and what learning rates they get."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import lightning_optim
from lightning_optim import LightningOptimWarning, Muon, create_optimizer
from lightning_optim import warnings as package_warnings

from .common import named_groups


class Model(nn.Module):
    """A little of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.pos_emb = nn.Parameter(torch.zeros(5, 6))
        self.conv1d, self.conv2d = nn.Conv1d(6, 6, 3), nn.Conv2d(6, 4, 3)
        self.experts = nn.Parameter(torch.zeros(3, 6, 6))
        self.body, self.norm = nn.Linear(6, 8), nn.LayerNorm(6)
        self.multihead = nn.Linear(6, 6, bias=False)
        self.head, self.lm_head = nn.Linear(6, 2), nn.Linear(6, 11, bias=False)
        self.row, self.spectrum = nn.Linear(6, 1), nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))


HIDDEN = ["experts", "conv1d.weight", "conv2d.weight", "body.weight", "multihead.weight"]


def by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Any]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_names_tell_embeddings_and_heads_from_hidden_matrices() -> None:
    model = Model()
    optimizer = Muon(model.named_parameters(), lr=0.1, adamw_lr=0.01)
    (hidden, names), (other, rest) = named_groups(optimizer)
    assert (hidden, other) == (True, False)
    # What is called "tokens" could be anything; of the model, its type tells (see below).
    assert sorted(names) == sorted([*HIDDEN, "tokens.weight"])
    assert sorted([*names, *rest]) == sorted(name for name, _ in model.named_parameters())
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]


def test_create_optimizer_knows_the_modules() -> None:
    model = Model()
    optimizer = create_optimizer(
        "muon", model, lr=0.1, adamw_lr=0.01, weight_decay=0.2, layer_decay=None, overrides={"head.*": {"lr": 0.5}}
    )
    groups = by_name(optimizer, model)
    assert sorted(name for name, group in groups.items() if group["use_muon"]) == sorted(HIDDEN)
    assert [name for name, group in groups.items() if not group["stacked"]] == ["conv1d.weight"]
    assert {name: group["lr"] for name, group in groups.items() if name in ("body.weight", "body.bias")} == {
        "body.weight": 0.1,
        "body.bias": 0.01,
    }
    assert groups["head.weight"]["lr"] == 0.5
    assert groups["body.weight"]["weight_decay"] == groups["tokens.weight"]["weight_decay"] == 0.2
    assert groups["body.bias"]["weight_decay"] == 0.0
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == len(names)
    assert {"decay.muon", "decay.muon_conv", "decay.adamw", "no_decay.adamw"} <= set(names)


def test_layer_decay_is_of_both_kinds() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3)) for _ in range(3)))
    groups = by_name(create_optimizer("muon", model, lr=0.1, adamw_lr=0.01, layer_decay=0.5), model)
    for layer, factor in enumerate((0.25, 0.5, 1.0)):
        assert groups[f"{layer}.0.weight"]["lr"] == pytest.approx(0.1 * factor)
        assert groups[f"{layer}.0.bias"]["lr"] == pytest.approx(0.01 * factor)


def test_patterns_of_ones_own() -> None:
    model = Model()
    optimizer = Muon(model.named_parameters(), adamw_patterns=["body.*", "t*"])
    assert sorted(named_groups(optimizer)[0][1]) == sorted(
        [*(name for name in HIDDEN if name != "body.weight"), "pos_emb", "head.weight", "lm_head.weight"]
    )
    groups = by_name(create_optimizer("muon", model, adamw_patterns=["body.*"]), model)
    assert not groups["body.weight"]["use_muon"]
    assert groups["lm_head.weight"]["use_muon"]


def test_without_names_all_matrices_are_orthogonalized_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_warnings, "_seen", set())
    model = Model()
    with pytest.warns(LightningOptimWarning, match=r"named_parameters\(\).*create_optimizer.*use_muon=True") as seen:
        optimizer, _ = (Muon(model.parameters()) for _ in range(2))
    assert len(seen) == 1
    groups = by_name(optimizer, model)
    assert {name for name, group in groups.items() if group["use_muon"]} == {
        *HIDDEN, "tokens.weight", "pos_emb", "head.weight", "lm_head.weight"
    }  # fmt: skip


def test_vectors_need_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_warnings, "_seen", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = Muon([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4, 1))])
        Muon([{"params": [nn.Parameter(torch.zeros(3, 3))], "use_muon": True}])
    assert [group["use_muon"] for group in optimizer.param_groups] == [False]


def test_a_group_added_later_is_split_too() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = Muon([{"params": list(first.named_parameters()), "name": "first"}], lr=0.1, adamw_lr=0.01)
    optimizer.add_param_group({"params": list(second.named_parameters()), "name": "second", "lr": 0.2})
    assert [g["name"] for g in optimizer.param_groups] == ["first.muon", "first.adamw", "second.muon", "second.adamw"]
    # A learning rate of the group's own is of its matrices; the rest keeps its distance from it.
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.01, 0.2, 0.02])


def test_a_group_that_says_what_it_is_is_taken_as_it_is() -> None:
    a, b = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(3, 3))
    groups = [{"params": [a], "use_muon": False}, {"params": [b], "use_muon": False, "lr": 0.3}]
    optimizer = Muon(groups, lr=0.1, adamw_lr=0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.3]
    assert len(Muon([{"params": [a], "use_muon": True}], lr=0.1).param_groups) == 1


@pytest.mark.parametrize("lr", [torch.tensor(0.1), torch.tensor(0.2)], ids=["the same", "another"])
def test_tensors_as_learning_rates_stay_tensors(lr: torch.Tensor) -> None:
    optimizer = Muon([{"params": list(nn.Linear(3, 3).named_parameters()), "lr": lr}], lr=0.1, adamw_lr=0.01)
    assert all(isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([float(lr), float(lr) / 10])


def test_copies_split_groups_alike() -> None:
    optimizer = copy.deepcopy(Muon(nn.Linear(3, 3).named_parameters(), lr=0.1, adamw_lr=0.01, adamw_patterns=["x*"]))
    optimizer.add_param_group({"params": [("x", nn.Parameter(torch.zeros(3, 3)))]})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01, 0.01]


def test_a_scheduler_scales_every_group() -> None:
    model = nn.Linear(3, 3)
    optimizer = Muon(model.named_parameters(), lr=0.1, adamw_lr=0.01)
    schedule = lightning_optim.Linear(optimizer, warmup_steps=0, total_steps=4)
    for left in (0.75, 0.5, 0.25):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        schedule.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * left, 0.01 * left])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("ns_steps", 0, "ns_steps=0; valid: a number of steps from 1 to 99"),
        ("ns_steps", 2.5, "ns_steps=2.5; valid"),
        ("ns_steps", 100, "ns_steps=100; valid"),
        ("ns_coefficients", "jordan", "ns_coefficients='jordan'; valid: muon, polar_express"),
        ("adjust_lr", None, "adjust_lr=None; valid: original, match_rms_adamw"),
        ("momentum", 1.0, r"momentum=1.0; valid: a number in \[0, 1\)"),
        ("adamw_lr", -1.0, "adamw_lr=-1.0; valid: a finite number >= 0"),
        ("adamw_patterns", "head.*", r"adamw_patterns='head\.\*'; valid: a list of globs"),
        ("stacked", 1, "stacked=1 is not a bool"),
    ],
)
def test_wrong_options_are_refused(option: str, value: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Muon(nn.Linear(3, 3).named_parameters(), **{option: value})


def test_what_is_no_matrix_cannot_be_orthogonalized() -> None:
    for p in (torch.zeros(3), torch.zeros(()), torch.zeros(3, 3, dtype=torch.complex64)):
        with pytest.raises(ValueError, match=r"use_muon=True with parameter 1 .*valid: real weights of two or more"):
            Muon([{"params": [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(p)], "use_muon": True}])
    with pytest.raises(TypeError, match="use_muon='yes' is not a bool"):
        Muon([{"params": [nn.Parameter(torch.zeros(2, 2))], "use_muon": "yes"}])
