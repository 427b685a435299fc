"""Distributed checkpoints, written and read by one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import references
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from lightning_optim import param_groups
from lightning_optim.optimizers.base import RuleOptimizer

from .common import KINDS, Make, Net, assert_close, assert_same_state, each, known_warnings, maker, train

pytestmark = known_warnings


def _several_groups(make: Make, net: nn.Module) -> RuleOptimizer:
    return make(param_groups(net, lr=0.05, weight_decay=0.1, layer_decay=0.5))


@pytest.mark.matrix(unless=lambda name, flatten: name in KINDS and (flatten or references.representative(name)))
@each
@pytest.mark.parametrize("groups", ["one group", "several groups"])
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_distributed_checkpoint(name: str, groups: str, flatten: bool, tmp_path: Path) -> None:
    """Save, load into an optimizer that has made no step: weights, state and options as they were, and go on."""
    make = maker(name)
    build: Callable[[nn.Module], RuleOptimizer] = (
        partial(_several_groups, make) if groups == "several groups" else lambda net: make(net.parameters())
    )
    nets = [Net(), Net()]
    optimizers = [build(net) for net in nets]
    train(nets[0], optimizers[0], range(3))
    for group in optimizers[0].param_groups:
        group["lr"] *= 0.5
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = {
        "model": get_model_state_dict(nets[0]),
        "optimizer": get_optimizer_state_dict(nets[0], optimizers[0], options=options),
    }
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    target: dict[str, Any] = {
        "model": get_model_state_dict(nets[1]),
        "optimizer": get_optimizer_state_dict(nets[1], optimizers[1], options=options),
    }
    dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(nets[1], target["model"])
    set_optimizer_state_dict(nets[1], optimizers[1], target["optimizer"], options=options)
    assert_same_state(optimizers[1].state_dict(), optimizers[0].state_dict())
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, range(3, 6))
    assert_close(nets[1].state_dict(), nets[0].state_dict(), rtol=0, atol=0)
