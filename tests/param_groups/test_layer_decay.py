"""Layer decay: which layer has which learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim.param_groups import param_groups

from .common import GPT, Block, by_name


def layers(model: nn.Module) -> dict[str, float]:
    """Parameter name -> steps down from the top."""
    lrs = by_name(model, param_groups(model, lr=1.0, layer_decay=0.5), "lr")
    steps = {1.0 * 0.5**n: n for n in range(64)}
    return {name: steps[lr] for name, lr in lrs.items()}


def under(values: dict[str, float], prefix: str) -> set[float]:
    return {value for name, value in values.items() if name.startswith(prefix)}


def test_transformer_layers() -> None:
    found = layers(GPT(3))
    assert found["positions"] == found["tokens.weight"] == 4
    assert [under(found, f"blocks.{i}.") for i in range(3)] == [{3}, {2}, {1}]
    assert found["norm.weight"] == found["head.weight"] == 0


def test_tied_embedding_is_at_the_bottom() -> None:
    assert layers(GPT(3, tied=True))["tokens.weight"] == 4


def test_embedding_defined_late_is_at_the_bottom() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(2))
    model.tokens = nn.Embedding(4, 4)
    model.head = nn.Linear(4, 4)
    assert (layers(model)["tokens.weight"], layers(model)["head.weight"]) == (3, 0)


def test_deep_head_is_not_taken_for_the_body() -> None:
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList([Block(), Block()]),
            "head": nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))),
        }
    )
    found = layers(model)
    assert [under(found, f"blocks.{i}.") for i in range(2)] == [{2}, {1}]
    assert under(found, "head.") == {0}


def test_lists_inside_a_block_are_not_layers() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(Block() for _ in range(5))}) for _ in range(2))
    model.head = nn.Linear(4, 4)
    found = layers(model)
    assert [under(found, f"blocks.{i}.") for i in range(2)] == [{2}, {1}]


def test_stages_of_like_blocks_count_on() -> None:
    model = nn.Module()
    model.stem = nn.Conv2d(3, 4, 1)
    model.stage1 = nn.Sequential(Block(), Block())
    model.between = nn.LayerNorm(4)
    model.stage2 = nn.Sequential(Block(), Block(), Block())
    model.head = nn.Linear(4, 4)
    found = layers(model)
    assert under(found, "stem.") == {6}
    assert [under(found, f"stage1.{i}.") for i in range(2)] == [{5}, {4}]
    assert under(found, "between.") == {4}
    assert [under(found, f"stage2.{i}.") for i in range(3)] == [{3}, {2}, {1}]
    assert under(found, "head.") == {0}


def test_plain_stacks() -> None:
    perceptron = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    assert [under(layers(perceptron), f"{i}.") for i in (0, 2, 4)] == [{2}, {1}, {0}]
    unlike = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    assert [under(layers(unlike), f"{i}.") for i in (0, 1, 3)] == [{2}, {1}, {0}]


class Timm(nn.Module):
    """A model with the names of timm's vision transformer and its ways of grouping."""

    def __init__(self, matcher: Any) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)  # defined first, so that the order of definition would mislead
        self.norm = nn.LayerNorm(4)
        self.blocks = nn.Sequential(Block(), Block())
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.group_matcher = lambda: matcher


def by_function(name: str) -> Sequence[float]:
    if name.startswith("blocks."):
        return (1, int(name.split(".")[1]))
    return (0,) if name == "cls_token" else (float("inf"),)


@pytest.mark.parametrize(
    ("matcher", "of_norm"),
    [
        ({"stem": r"^cls_token", "blocks": r"^blocks\.(\d+)"}, 0),
        ({"stem": r"^cls_token", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))], "x": None}, 1),
        (by_function, 0),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_group_matcher(matcher: Any, of_norm: int, inside: bool) -> None:
    model: nn.Module = Timm(matcher)
    prefix = ""
    if inside:
        # Around the backbone, and called as a part of it is.
        model, prefix = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(2, 2)), "net": model}), "net."
    found = layers(model)
    assert under(found, f"{prefix}cls_token") == {3}
    assert [under(found, f"{prefix}blocks.{i}.") for i in range(2)] == [{2}, {1}]
    assert under(found, f"{prefix}norm.") == {of_norm}
    assert under(found, f"{prefix}head.") == {0}
    if inside:
        assert under(found, "blocks.") == {0}


def test_layer_decay_of_one_is_none() -> None:
    model = GPT()
    assert param_groups(model, lr=0.1, layer_decay=1.0) == param_groups(model, lr=0.1)
