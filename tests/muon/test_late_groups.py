"""Groups that are added to Muon in mid-run, as finetuning callbacks do, and their learning rates."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import lightning_optim
from lightning_optim import Muon


def optimizer_with_a_late_group(**group: Any) -> tuple[Muon, nn.Module]:
    head, backbone = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = Muon([{"params": list(head.parameters())}], lr=0.1, adamw_lr=0.01)
    optimizer.add_param_group({"params": list(backbone.parameters()), **group})
    return optimizer, nn.ModuleList([head, backbone])


def lrs(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("part", [-1, -2])
@pytest.mark.filterwarnings("ignore:Muon. the parameters have no names")
def test_a_learning_rate_for_one_part_is_the_groups(part: int) -> None:
    """A callback knows of no parts: it writes to the last group, or to the one that it added."""
    optimizer, model = optimizer_with_a_late_group(lr=0.2)
    assert lrs(optimizer) == pytest.approx([0.1, 0.01, 0.2, 0.02])
    step(optimizer)
    for lr in (0.4, 0.0, 0.1):
        optimizer.param_groups[part]["lr"] = lr
        before = [p.detach().clone() for p in model[1].parameters()]  # type: ignore[index]
        step(optimizer)
        assert lrs(optimizer) == pytest.approx([0.1, 0.01, lr, lr / 10])
        for p, old in zip(model[1].parameters(), before, strict=True):  # type: ignore[index]
            assert torch.equal(p, old) == (lr == 0)
    again, _ = optimizer_with_a_late_group(lr=0.2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.param_groups[part]["lr"] = 0.3
    step(again)
    assert lrs(again) == pytest.approx([0.1, 0.01, 0.3, 0.03])


@pytest.mark.filterwarnings("ignore:Muon. the parameters have no names")
def test_schedules_move_both_parts() -> None:
    optimizer, _ = optimizer_with_a_late_group(lr=0.2)
    schedule = lightning_optim.Linear(optimizer, warmup_steps=0, total_steps=4)
    for left in (0.75, 0.5, 0.25):
        step(optimizer)
        schedule.step()
        assert lrs(optimizer) == pytest.approx([lr * left for lr in (0.1, 0.01, 0.2, 0.02)])
    apart = torch.optim.lr_scheduler.LambdaLR(optimizer, [partial(pow, factor) for factor in (0.9, 0.8, 0.7, 0.6)])
    step(optimizer)
    apart.step()
    expected = lrs(optimizer)
    step(optimizer)
    assert lrs(optimizer) == expected


@pytest.mark.filterwarnings("ignore:Muon. the parameters have no names")
def test_the_constructors_groups_are_set_one_by_one() -> None:
    optimizer, _ = optimizer_with_a_late_group(lr=0.2)
    optimizer.param_groups[1]["lr"] = 0.5
    step(optimizer)
    assert lrs(optimizer) == pytest.approx([0.1, 0.5, 0.2, 0.02])
    layer = nn.Linear(3, 3)
    optimizer.add_param_group({"params": [layer.weight], "use_muon": True, "lr": 0.3})
    optimizer.add_param_group({"params": [layer.bias], "use_muon": False, "lr": 0.03})
    step(optimizer)
    optimizer.param_groups[-1]["lr"] = 0.7
    step(optimizer)
    assert lrs(optimizer)[-2:] == [0.3, 0.7]


@pytest.mark.parametrize("lr", [0.0, 1e-300, 1e-24, 1e-8])
@pytest.mark.filterwarnings("ignore:Muon. the parameters have no names")
def test_a_constructors_lr_that_nobody_trains_with_is_no_measure(lr: float) -> None:
    """As a warm-up's first value: the share of AdamW is not its multiple."""
    layer = nn.Linear(3, 3)
    optimizer = Muon([{"params": list(layer.parameters()), "lr": 0.02}], lr=lr, adamw_lr=3e-4)
    assert lrs(optimizer) == [0.02, 3e-4]


@pytest.mark.filterwarnings("ignore:Muon. the parameters have no names")
def test_lightnings_finetuning_callback_moves_both_parts() -> None:
    finetuning = pytest.importorskip("lightning.pytorch.callbacks.finetuning")
    head, backbone = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = Muon(head.parameters(), lr=0.1, adamw_lr=0.01)
    module = nn.Module()
    module.backbone = backbone
    callback = finetuning.BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.02, verbose=False)
    callback.freeze(backbone)
    for epoch in range(4):
        callback.finetune_function(module, epoch, optimizer)
        step(optimizer)
        if epoch:
            lr = min(0.02 * 2 ** (epoch - 1), 0.1)
            assert lrs(optimizer) == pytest.approx([0.1, 0.01, lr, lr / 10])


def test_two_late_groups_of_one_ratio_are_moved_by_a_schedule() -> None:
    """The second part of one and the first of the next are no two parts of a group."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    optimizer = lightning_optim.Muon(net[0].parameters(), lr=0.01)
    for layer in (net[1], net[2]):
        optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.01})
    for _ in range(3):
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        expected = [group["lr"] for group in optimizer.param_groups]
        optimizer.zero_grad()
        net(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
        assert [group["lr"] for group in optimizer.param_groups] == expected
