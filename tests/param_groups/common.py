"""What the tests of the parameter groups share: models, and what a group says of each parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_optim.param_groups import param_groups

Groups = list[dict[str, Any]]


class OddRMSNorm(nn.Module):
    """A norm that no type of torch's reveals, with a two-dimensional gain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 4))


class Plain(nn.LayerNorm):
    """A norm that only its base reveals."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = OddRMSNorm()
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class GPT(nn.Module):
    def __init__(self, layers: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 8, 4))
        self.tokens = nn.Embedding(16, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 16, bias=False)
        if tied:
            self.head.weight = self.tokens.weight


def by_name(model: nn.Module, groups: Groups, key: str) -> dict[str, Any]:
    """Parameter name -> a group option, with the check that each parameter is in exactly one group."""
    names = {id(p): name for name, p in model.named_parameters()}
    members = [id(p) for group in groups for p in group["params"]]
    assert len(members) == len(set(members))
    return {names[id(p)]: group.get(key) for group in groups for p in group["params"]}


def decayed(model: nn.Module, **options: Any) -> set[str]:
    values = by_name(model, param_groups(model, weight_decay=0.1, **options), "weight_decay")
    assert set(values) == {name for name, _ in model.named_parameters()}
    assert set(values.values()) <= {0.0, 0.1}
    return {name for name, value in values.items() if value}
