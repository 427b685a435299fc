"""The learning rates of an optimizer's groups during a range test, with their ratios kept."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_optim.control.schedules.learning_rates import (
    all_groups,
    multiply_learning_rates,
    unknown_schedules,
    with_inner,
)
from lightning_optim.stepping.evaluations import request_of
from lightning_optim.warnings import warn_once

#: Where a group has its learning rate without the factor of a schedule, the first of these that there is: OneCycleLR
#: has the peak in ``max_lr``, other schedules have it in ``initial_lr``.
_BASES = ("max_lr", "initial_lr", "lr")

#: The beginnings of names of optimizers, of any package, that estimate their step size themselves.
_ESTIMATING = ("Prodigy", "DAdapt", "DoG", "LDoG", "DoWG", "Mechanic")


class GroupRates:
    """Sets the learning rates of all groups by one number, and puts them back.

    The number is the learning rate of the group that has the highest one; those of the others keep their ratio to it.
    Learning rates count without the factor that a schedule has at the moment (0 at the start of a warmup, say).

    Args:
        optimizer: The optimizer; the groups of those that it wraps are included.
        who: Who asks, for errors.

    Attributes:
        reference: The highest learning rate.

    Raises:
        ValueError: A range test of this optimizer would say nothing.

    Example:
        >>> slow, fast = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([{"params": [slow], "lr": 0.1}, {"params": [fast], "lr": 1.0}])
        >>> rates = GroupRates(optimizer)
        >>> rates.set(0.5)
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.05, 0.5]
        >>> rates.put_back()
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.1, 1.0]
    """

    def __init__(self, optimizer: Optimizer, who: str = "find_lr") -> None:
        if (reason := why_no_range_test(optimizer)) is not None:
            raise ValueError(f"{who}: {reason}")
        self._optimizer = optimizer
        self._groups = [group for group in all_groups(optimizer) if _is_rate(group.get("lr"))]
        self._bases = [_base(group) for group in self._groups]
        self._before = [(group["lr"], _copied(group["lr"])) for group in self._groups]
        self.reference = max(self._bases)

    def set(self, lr: float) -> None:
        """Set the learning rates; those that are tensors are written in place."""
        for group, base in zip(self._groups, self._bases, strict=True):
            value = lr * (base / self.reference)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def put_back(self) -> None:
        """Set the learning rates to what they were when this object was made."""
        for group, (lr, copy) in zip(self._groups, self._before, strict=True):
            if isinstance(lr, Tensor):
                lr.copy_(copy)
            group["lr"] = lr


def apply_lr(optimizer: Optimizer, lr: float, reference: float, schedules: Iterable[object] = ()) -> None:
    """Train on as if the optimizer and its schedules had been made with another learning rate.

    Args:
        optimizer: The optimizer.
        lr: The learning rate for the group that has the highest one; the others keep their ratio to it.
        reference: The highest learning rate as it is: :attr:`GroupRates.reference`.
        schedules: The schedules of the optimizer: their base learning rates, peaks and floors are multiplied, too.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        >>> apply_lr(optimizer, 0.5, reference=0.1, schedules=[schedule])
        >>> optimizer.step()
        >>> schedule.step()
        >>> schedule.get_last_lr()
        [0.25]
    """
    schedules = list(schedules)
    for name in unknown_schedules(schedules):
        warn_once(
            f"the range test multiplies the learning rates that {name} keeps by torch's names (base_lrs, eta_min, "
            "...); if it keeps them elsewhere, its next step takes the multiplication back"
        )
    multiply_learning_rates(all_groups(optimizer), schedules, lr / reference)


def why_no_range_test(optimizer: Optimizer) -> str | None:
    """Why a range test of an optimizer would say nothing; None: it says something.

    Example:
        >>> why_no_range_test(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)) is None
        True
    """
    for one in with_inner(optimizer):
        name = type(one).__name__.removesuffix("Optim")
        if request_of(one) == "loss_and_gradient" or isinstance(one, LBFGS):
            return f"{name} chooses the length of its steps by the loss itself: no range test is needed, leave lr at 1"
        if type(one).__name__.startswith(_ESTIMATING):
            return (
                f"{name} estimates its step size on the way, and its lr only multiplies the estimate: leave lr at 1; "
                "a range test is of optimizers with a learning rate"
            )
    rates = [group.get("lr") for group in all_groups(optimizer)]
    if not any(map(_is_rate, rates)):
        return (
            f"{type(optimizer).__name__} has no learning rate (lr is {rates[0] if rates else 'missing'} in its param "
            "groups); a range test is of optimizers with an lr"
        )
    if not any(_base(group) > 0 for group in all_groups(optimizer) if _is_rate(group.get("lr"))):
        return f"all learning rates of {type(optimizer).__name__} are 0, and their ratios unknown; valid: lr > 0"
    return None


def _is_rate(lr: Any) -> bool:
    return isinstance(lr, numbers.Real | Tensor)


def _base(group: dict[str, Any]) -> float:
    return float(next(group[name] for name in _BASES if _is_rate(group.get(name))))


def _copied(lr: Any) -> Any:
    return lr.detach().clone() if isinstance(lr, torch.Tensor) else lr
