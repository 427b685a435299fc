"""Multiplying the learning rate of a run, so that schedules go on from there instead of undoing it.

A schedule that computes its value from base learning rates would overwrite a group's ``lr`` at its next step. So all
learning rates that groups and schedules know of are multiplied together: the curve stays, at another height.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.schedulers.base.group_rates import plain

#: Options of a param group that are learning rates, as torch's schedules (OneCycleLR, SWALR and others) keep them.
GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")

# Attributes of schedules that are learning rates: lists with one for each group (in CyclicLR, ReduceLROnPlateau), and
# single ones (in cosine schedules; and those that ReduceLROnPlateau gives to groups that are added later).
_LISTS = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_SINGLE = ("eta_min", "default_min_lr")


def multiply_learning_rates(groups: Iterable[dict[str, Any]], schedules: Iterable[object], factor: float) -> None:
    """Multiply every learning rate of param groups and of the schedules that set them.

    A group's ``lr`` that is a tensor is changed in place.

    Args:
        groups: Param groups.
        schedules: The schedules of those groups: torch's (also ``SequentialLR``, ``ChainedScheduler`` and
            ``ReduceLROnPlateau``), ours, and others that keep their learning rates by torch's names.
        factor: The factor.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        >>> multiply_learning_rates(optimizer.param_groups, [schedule], 0.5)
        >>> optimizer.step()
        >>> schedule.step()
        >>> optimizer.param_groups[0]["lr"]
        0.25
    """
    factor = float(factor)
    in_place: dict[int, Tensor] = {}  # groups may share one
    for group in groups:
        for name in GROUP_RATES:
            if name not in group or group[name] is None:
                continue
            if name == "lr" and isinstance(group[name], Tensor):
                in_place[id(group[name])] = group[name]
            else:
                group[name] = plain(group[name] * factor)
    for lr in in_place.values():
        lr.mul_(factor)
    for schedule in _each(schedules):
        for name in _LISTS:
            values = getattr(schedule, name, None)
            if isinstance(values, list | tuple):
                # New lists: a state_dict that was made earlier holds the old ones.
                setattr(schedule, name, [plain(value * factor) for value in values])
        for name in _SINGLE:
            if isinstance(value := getattr(schedule, name, None), numbers.Real | Tensor):
                setattr(schedule, name, plain(value * factor))


def unknown_schedules(schedules: Iterable[object]) -> list[str]:
    """The classes of those schedules of which it is not known where they keep learning rates.

    Example:
        >>> unknown_schedules([object()])
        ['builtins.object']
    """
    known = ("torch.optim.", "lightning_optim.", "lightning.pytorch.cli", "pytorch_lightning.cli")
    found = []
    for schedule in _each(schedules):
        cls = type(schedule)
        computes = [getattr(inspect.getmodule(getattr(cls, name, None)), "__name__", "") for name in ("step", "get_lr")]
        if not all(name.startswith(known) for name in computes if name) or not any(computes):
            found.append(f"{cls.__module__}.{cls.__qualname__}")
    return found


def all_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The param groups of an optimizer and of those that it wraps, each once."""
    found: dict[int, dict[str, Any]] = {}
    for one in with_inner(optimizer):
        found.update((id(group), group) for group in one.param_groups)
    return list(found.values())


def with_inner(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimizer, the optimizers among its attributes, and those among theirs."""
    waiting, seen = [optimizer], {id(optimizer)}
    while waiting:
        one = waiting.pop(0)
        yield one
        for value in vars(one).values():
            if isinstance(value, Optimizer) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)


def _each(schedules: Iterable[object]) -> Iterator[object]:
    """Schedules and those within them, each once."""
    waiting, seen = list(schedules), set[int]()
    while waiting:
        schedule = waiting.pop(0)
        if id(schedule) in seen:
            continue
        seen.add(id(schedule))
        yield schedule
        inner = getattr(schedule, "_schedulers", None)  # SequentialLR and ChainedScheduler have these
        if isinstance(inner, list | tuple):
            waiting += inner
