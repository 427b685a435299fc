"""Multiplied learning rates: every schedule goes on with the same curve, at another height."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler as torch_schedules

from lightning_optim.control.schedules.learning_rates import multiply_learning_rates, unknown_schedules
from lightning_optim.schedulers import WSD, Cosine, Linear

Schedule = Callable[[torch.optim.Optimizer], Any]


def _phases(optimizer: torch.optim.Optimizer) -> Any:
    first = torch_schedules.LinearLR(optimizer, 0.1, total_iters=4)
    second = torch_schedules.CosineAnnealingLR(optimizer, 6, eta_min=0.01)
    third = WSD(optimizer, total_steps=10)
    return torch_schedules.SequentialLR(optimizer, [first, second, third], milestones=[4, 9])


def _chain(optimizer: torch.optim.Optimizer) -> Any:
    return torch_schedules.ChainedScheduler(
        [torch_schedules.ExponentialLR(optimizer, 0.9), torch_schedules.ConstantLR(optimizer, 0.5, total_iters=6)]
    )


SCHEDULES: dict[str, Schedule] = {
    "Linear": lambda o: Linear(o, warmup_steps=3, total_steps=20, min_lr_ratio=0.1),
    "Cosine": lambda o: Cosine(o, warmup_steps=3, total_steps=20),
    "WSD": lambda o: WSD(o, warmup_steps=3, total_steps=20),
    "one lambda": lambda o: torch_schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "lambdas": lambda o: torch_schedules.LambdaLR(o, [lambda step: 1 / (1 + step), lambda step: 0.9**step]),
    "factors": lambda o: torch_schedules.MultiplicativeLR(o, lambda step: 0.95),
    "steps": lambda o: torch_schedules.StepLR(o, 3, 0.5),
    "milestones": lambda o: torch_schedules.MultiStepLR(o, [2, 9], 0.5),
    "exponential": lambda o: torch_schedules.ExponentialLR(o, 0.9),
    "polynomial": lambda o: torch_schedules.PolynomialLR(o, 15, 2.0),
    "cosine": lambda o: torch_schedules.CosineAnnealingLR(o, 6, eta_min=0.01),
    "restarts": lambda o: torch_schedules.CosineAnnealingWarmRestarts(o, 4, eta_min=0.01),
    "one cycle": lambda o: torch_schedules.OneCycleLR(o, [0.8, 0.4], 20),
    "cyclic": lambda o: torch_schedules.CyclicLR(o, 0.1, 0.8, 4),
    "phases": _phases,
    "chain": _chain,
    "plateau": lambda o: torch_schedules.ReduceLROnPlateau(o, factor=0.25, patience=0, min_lr=[0.02, 0.01]),
    "averaged": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=5),
}


def lrs_of(make: Schedule, *, halve_at: int, tensors: bool, saved_at: int | None = None) -> list[list[float]]:
    """The learning rates of 20 steps."""

    def build() -> Any:
        params = [torch.zeros(1, requires_grad=True) for _ in range(2)]
        lrs = [torch.tensor(lr, dtype=torch.float64) if tensors else lr for lr in (1.0, 0.25)]
        optimizer = torch.optim.SGD(
            [{"params": [p], "lr": lr} for p, lr in zip(params, lrs, strict=True)], momentum=0.9
        )
        return optimizer, make(optimizer)

    optimizer, schedule = build()
    found = []
    for step in range(20):
        if step == saved_at:
            state = optimizer.state_dict(), schedule.state_dict()
            optimizer, schedule = build()
            optimizer.load_state_dict(state[0])
            schedule.load_state_dict(state[1])
        if step == halve_at:
            multiply_learning_rates(optimizer.param_groups, [schedule], 0.5)
        found.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        if isinstance(schedule, torch_schedules.ReduceLROnPlateau):
            schedule.step(1.0 if step % 3 else 2.0)
        else:
            schedule.step()
    return found


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.* before .*optimizer.step")
@pytest.mark.filterwarnings("ignore:The epoch parameter in")
def test_schedules_go_on_at_half_the_height(name: str, tensors: bool) -> None:
    if tensors and name in ("plateau", "lambdas"):
        tensors = False  # torch's ReduceLROnPlateau compares lists of them; per-group lambdas are no other case
    make = SCHEDULES[name]
    stock = lrs_of(make, halve_at=99, tensors=tensors)
    for at in (0, 1, 5, 10):
        found = lrs_of(make, halve_at=at, tensors=tensors)
        # A factor of a half is exact, wherever in the formula it is.
        assert found == stock[:at] + [[lr / 2 for lr in lrs] for lrs in stock[at:]]


@pytest.mark.parametrize("name", ["Cosine", "one lambda", "cosine", "one cycle", "cyclic", "plateau"])
def test_and_so_after_a_checkpoint(name: str) -> None:
    make = SCHEDULES[name]
    resumed = lrs_of(make, halve_at=4, tensors=False, saved_at=9)
    assert resumed == lrs_of(make, halve_at=4, tensors=False)


def test_a_tensor_that_groups_share_is_multiplied_once() -> None:
    lr = torch.tensor(1.0)
    params = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p in params], lr=lr)
    multiply_learning_rates(optimizer.param_groups, [], 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [lr, lr]
    assert lr.item() == 0.5


def test_which_schedules_are_known() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)

    class Own(torch_schedules.LRScheduler):
        def get_lr(self) -> list[float | Tensor]:
            return [0.1]

    stock = [make(optimizer) for name, make in SCHEDULES.items() if name not in ("lambdas", "one cycle", "plateau")]
    assert unknown_schedules(stock) == []
    assert unknown_schedules([Own(optimizer)]) == [f"{__name__}.{Own.__qualname__}"]


def test_numpy_numbers_are_multiplied_and_stay_out_of_checkpoints() -> None:
    numbers: Any = {"lr": np.float64(1.0), "eta_min": np.float32(0.5), "factor": np.float64(0.5)}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=numbers["lr"])
    schedule = torch_schedules.CosineAnnealingLR(optimizer, 6, eta_min=numbers["eta_min"])
    multiply_learning_rates(optimizer.param_groups, [schedule], numbers["factor"])
    found = [optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["initial_lr"], *schedule.base_lrs]
    assert [*found, schedule.eta_min] == [0.5, 0.5, 0.5, 0.25]
    assert {type(number) for number in [*found, schedule.eta_min]} == {float}
