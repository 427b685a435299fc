"""Models whose loss spikes, and what a run is like in which those steps were not made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .common import EXACT, assert_same_steps, model_class, network

#: A loss 100 times the mean, after two of them: whatever the other batches' losses are, they are no spikes.
POLICY: dict[str, Any] = {"warmup_steps": 2, "min_ratio": 100.0}


@cache
def poisoned_class(root: str = "lightning.pytorch") -> Any:
    """A model of either root, with batch norm, and a number that is added to the targets of some batches."""

    class Poisoned(model_class(root)):  # type: ignore[misc]
        def __init__(self, make: Any = None, poisoned: Mapping[int, float] | None = None, batch: int = 2) -> None:
            super().__init__(make, batch)
            net = network()
            self.net = nn.Sequential(net[0], net[1], nn.BatchNorm1d(7), net[2], net[3])
            self.poisoned = dict(poisoned or {})

        @property
        def number(self) -> int:
            """Of the batch, in the whole run."""
            return self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            x, y = batch
            return {"loss": super().training_step([x, y + self.poisoned.get(self.number, 0.0)], batch_idx)}

    return Poisoned


@cache
def reference_class(root: str = "lightning.pytorch") -> Any:
    """The same, but that some batches might as well not be there, and learning rates are halved at others."""

    class Reference(poisoned_class(root)):  # type: ignore[misc]
        def __init__(self, make: Any = None, *, skip: AbstractSet[int], halve: AbstractSet[int] = frozenset()) -> None:
            super().__init__(make)
            self.skip, self.halve = skip, halve

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            # Not None, which Lightning does not take from several processes.
            return torch.zeros((), requires_grad=True) if self.is_left_out else super().training_step(batch, batch_idx)

        @property
        def is_left_out(self) -> bool:
            return self.number in self.skip

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            if self.number in self.halve:
                (config,) = self.trainer.lr_scheduler_configs
                config.scheduler.base_lrs = [lr / 2 for lr in config.scheduler.base_lrs]
                for group in self.trainer.optimizers[0].param_groups:
                    group["lr"], group["initial_lr"] = group["lr"] / 2, group["initial_lr"] / 2
            if self.is_left_out:
                optimizer_closure()
            else:
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    return Reference


Poisoned, Reference = poisoned_class(), reference_class()


def assert_same_from(found: Any, expected: Any, batch: int, **tolerance: Any) -> None:
    """Weights and learning rates, after a batch and all later ones."""
    for one in (found, expected):
        one.weights, one.lrs = one.weights[batch:], one.lrs[batch:]
    assert_same_steps(found, expected, **tolerance or EXACT)
    assert all(math.isfinite(float(value.sum())) for value in found.weights[-1].values())
