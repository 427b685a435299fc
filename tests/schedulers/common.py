"""What the tests of the schedules share: an optimizer to schedule, and the learning rates that it had."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import (
    LRScheduler,
)

from lightning_optim.schedulers import WSD, Cosine, Linear, Schedule

Make = Callable[..., Schedule]
SCHEDULES: list[Make] = [Linear, Cosine, WSD]


def sgd(*lrs: float | torch.Tensor) -> torch.optim.SGD:
    lrs = lrs or (1.0,)
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs])


def advance(schedule: LRScheduler, steps: int) -> list[list[float]]:
    """The learning rates of ``steps`` optimizer steps, in which the schedule moves on."""
    seen = []
    for _ in range(steps):
        seen.append([float(group["lr"]) for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
        assert schedule.get_last_lr() == [group["lr"] for group in schedule.optimizer.param_groups]
    return seen


def lrs_of(schedule: LRScheduler, steps: int) -> list[float]:
    return [lrs[0] for lrs in advance(schedule, steps)]
