"""Weight decay: what is decayed and what is not."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_optim.param_groups import param_groups

from .common import GPT, OddRMSNorm, Plain, decayed


def test_matrices_are_decayed_and_biases_and_norms_are_not() -> None:
    weights = ("attention.in_proj_weight", "attention.out_proj.weight", "mlp.0.weight", "mlp.2.weight")
    blocks = {f"blocks.{i}.{name}" for i in range(3) for name in weights}
    assert decayed(GPT()) == blocks | {"positions", "tokens.weight", "head.weight"}


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm1d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm((4, 4)),
        nn.RMSNorm((4, 4)),
        Plain((4, 4)),
        OddRMSNorm(),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norms(norm: nn.Module) -> None:
    assert next(norm.parameters(), None) is not None
    assert decayed(nn.Sequential(norm, nn.Linear(4, 4))) == {"1.weight"}


def test_embeddings_are_decayed_unless_asked_otherwise() -> None:
    assert decayed(GPT()) - decayed(GPT(), decay_embeddings=False) == {"tokens.weight"}


def test_no_decay_adds_to_the_standard_rules() -> None:
    assert decayed(GPT()) - decayed(GPT(), no_decay=["positions", "head.*"]) == {"positions", "head.weight"}


def test_no_weight_decay_of_a_submodule_is_honoured() -> None:
    class Backbone(GPT):
        def no_weight_decay(self) -> set[str]:
            return {"positions", "cls_token"}  # the second does not exist here, as is usual with timm

    model = nn.ModuleDict({"body": Backbone(), "other": GPT()})
    assert "body.positions" not in decayed(model)
    assert "other.positions" in decayed(model)


def test_weight_decay_zero_keeps_the_groups_apart() -> None:
    groups = param_groups(GPT())
    assert [(group["name"], group["weight_decay"]) for group in groups] == [("decay", 0.0), ("no_decay", 0.0)]
    assert all("lr" not in group for group in groups)
