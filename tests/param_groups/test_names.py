"""Names, ties and freezing: which parameter is meant, whatever wraps or shares it."""

from __future__ import annotations

import io
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from lightning_optim.param_groups import param_groups

from .common import GPT, by_name, decayed


def test_tied_weight_appears_once_and_answers_to_each_name() -> None:
    model = GPT(tied=True)
    for pattern in ("head.weight", "tokens.weight"):
        lrs = by_name(model, param_groups(model, lr=1.0, overrides={pattern: {"lr": 3.0}}), "lr")
        assert lrs["tokens.weight"] == 3.0
    assert "tokens.weight" not in decayed(model, no_decay=["head.*"])


def test_shared_module_answers_to_each_name() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"encoder": shared, "decoder": shared})
    groups = param_groups(model, lr=1.0, overrides={"decoder.*": {"lr": 2.0}})
    assert [group["lr"] for group in groups] == [2.0, 2.0]


def test_partitioned_weight_is_judged_by_its_full_shape() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(torch.empty(0))  # as DeepSpeed's ZeRO-3 leaves it
    assert decayed(model) == set()
    model.weight.ds_shape = torch.Size([2, 2])  # type: ignore[attr-defined]
    assert decayed(model) == {"weight"}


def test_frozen_parameters_are_left_out_unless_included() -> None:
    model = GPT()
    model.tokens.requires_grad_(False)
    assert "tokens.weight" not in by_name(model, param_groups(model), "name")
    assert "tokens.weight" in by_name(model, param_groups(model, include_frozen=True), "name")


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "compiled":
        return torch.compile(model)  # type: ignore[return-value]
    if how == "parallel":
        return DataParallel(model)
    if how == "parallel of compiled":
        return DataParallel(wrapped(model, "compiled"))
    if how == "compiled blocks":
        assert isinstance(model, GPT)
        model.blocks = nn.ModuleList(torch.compile(block) for block in model.blocks)  # type: ignore[misc]
        return model
    module = pl.LightningModule()
    module.model = model
    return module


@pytest.mark.parametrize("how", ["compiled", "parallel", "parallel of compiled", "compiled blocks", "lightning"])
def test_wrappers_change_nothing(how: str) -> None:
    def split(model: nn.Module, prefix: str = "") -> list[tuple[Any, ...]]:
        overrides: dict[str, dict[str, Any]] = {
            f"{prefix}blocks.1.*": {"lr": 7.0},
            "*head.weight": {"betas": (0.9, 0.95)},
        }
        groups = param_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5, overrides=overrides)
        options = ("lr", "weight_decay", "betas")
        return [(*map(group.get, options), [id(p) for p in group["params"]]) for group in groups]

    class Exempt(GPT):
        def no_weight_decay(self) -> set[str]:
            return {"positions"}

    model = Exempt()
    plain = split(model)
    assert split(wrapped(model, how), "model." if how == "lightning" else "") == plain


def test_users_own_module_called_module_matches_by_its_name() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    lrs = by_name(model, param_groups(model, lr=1.0, overrides={"module.*": {"lr": 2.0}}), "lr")
    assert lrs == {"module.weight": 2.0, "module.bias": 2.0, "head.weight": 1.0, "head.bias": 1.0}


def test_names_are_unique_and_the_order_is_fixed() -> None:
    overrides = {"head.*": {"lr": 1e-3}, "*.bias": {"lr": 1e-4}, "blocks.0.mlp.*": {"lr": 1e-5}}

    def names() -> list[str]:
        return [group["name"] for group in param_groups(GPT(2), lr=1.0, layer_decay=0.5, overrides=overrides)]

    assert names() == names()
    assert len(set(names())) == len(names())
    assert names() == [
        "layer_0.decay",
        "layer_1.decay",
        "layer_1.no_decay",
        "layer_1.no_decay[*.bias]",
        "layer_1.no_decay[*.bias,blocks.0.mlp.*]",
        "layer_1.decay[blocks.0.mlp.*]",
        "layer_2.decay",
        "layer_2.no_decay",
        "layer_2.no_decay[*.bias]",
        "layer_3.no_decay",
        "layer_3.decay[head.*]",
        "layer_3.no_decay[*.bias]",
    ]


def test_groups_survive_a_checkpoint_and_train() -> None:
    model = GPT()
    groups = param_groups(model, lr=1e-3, weight_decay=0.1, layer_decay=0.5, overrides={"head.*": {"lr": 1.0}})
    optimizer = torch.optim.AdamW(groups)
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert [group["name"] for group in optimizer.param_groups] == [group["name"] for group in groups]
