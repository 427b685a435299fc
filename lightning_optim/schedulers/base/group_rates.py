"""The learning rates in an optimizer's param groups: read, written, and kept where its state is loaded."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

from torch import Tensor
from torch.optim import Optimizer

Rate = float | Tensor


def plain(rate: Any) -> Rate:
    """A learning rate as a Python number or as a cloned tensor, so that no NumPy scalar reaches a checkpoint.

    Example:
        >>> import numpy as np
        >>> plain(np.float32(0.5)), plain(1)
        (0.5, 1)
    """
    if isinstance(rate, Tensor):
        return rate.clone()
    return rate if type(rate) in (int, float) else float(rate)


def read_rates(optimizer: Optimizer) -> list[Rate]:
    """The learning rate of each group; tensors are copies."""
    return [plain(group["lr"]) for group in optimizer.param_groups]


def write_rates(optimizer: Optimizer, rates: Iterable[Rate]) -> None:
    """Set the learning rates of the first param groups, in place where the learning rate is a tensor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=False):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(float(rate))
        else:
            group["lr"] = float(rate) if isinstance(rate, Tensor) else rate


def make_rates_plain(optimizer: Optimizer) -> None:
    """Replace NumPy scalars among the param groups' learning rates by Python numbers."""
    for group in optimizer.param_groups:
        for name in {"lr", "initial_lr"} & group.keys():
            if not isinstance(group[name], Tensor):
                group[name] = plain(group[name])


class Joining(Protocol):
    """A schedule that can tell whether it has just joined its optimizer."""

    @property
    def has_just_joined(self) -> bool:
        """Whether it has made no step, and has loaded no state, since it was constructed."""


class LoadedRates:
    """Keeps the learning rates that a newly joined schedule has set when its optimizer's state is loaded.

    An optimizer's state contains the learning rates that were in force when it was saved. These are right for a
    schedule whose own state is loaded too. A schedule that is new in the run keeps the learning rates that it has set.
    """

    _of: ClassVar[weakref.WeakKeyDictionary[Optimizer, LoadedRates]] = weakref.WeakKeyDictionary()

    def __init__(self, optimizer: Optimizer) -> None:
        self._schedules: weakref.WeakSet[Joining] = weakref.WeakSet()
        self._before: list[Rate] | None = None
        #: The learning rates in the loaded state that a schedule has replaced by its own; None if there are none.
        self.rates: list[Rate] | None = None
        # Some wrappers in wide use (Lookahead) are optimizers that do not call torch's constructor and have no hooks.
        if hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):
            optimizer.register_load_state_dict_pre_hook(self._keep)
            optimizer.register_load_state_dict_post_hook(self._put_back)

    @classmethod
    def watch(cls, schedule: Joining, optimizer: Optimizer) -> LoadedRates:
        """Keep a new schedule's learning rates whenever its optimizer's state is loaded."""
        if optimizer not in cls._of:
            cls._of[optimizer] = cls(optimizer)
        cls._of[optimizer]._schedules.add(schedule)
        return cls._of[optimizer]

    def _keep(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        joined = any(schedule.has_just_joined for schedule in self._schedules)
        self._before = read_rates(optimizer) if joined else None

    def _put_back(self, optimizer: Optimizer) -> None:
        if self._before is not None:
            self.rates = read_rates(optimizer)
            write_rates(optimizer, self._before)
        self._before = None
