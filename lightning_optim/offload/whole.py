"""Steps of all masters at once, for optimizers that our engines do not know, or whose step sums over parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.engines.base import Decision
from lightning_optim.offload.buckets import OffloadBucket
from lightning_optim.offload.masters import masters_in_place
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.stepping.shards import local
from lightning_optim.stepping.stepper import Stepper


class Whole:
    """Steps all masters of an optimizer at once.

    Args:
        optimizer: Any optimizer; not kept alive.
        reason: Why all masters must be stepped at once.
        engine: The engine of the detached options.

    Attributes:
        stepper: Steps the masters, if that is done by a rule; None: the optimizer's own ``step`` does it.
    """

    def __init__(self, optimizer: Optimizer, reason: str, engine: str) -> None:
        self._reason = reason
        self.stepper: Stepper | None = None
        if isinstance(optimizer, RuleOptimizer) and not has_own_step(optimizer):
            engine = optimizer.options.engine if engine == "auto" else engine
            options = replace(optimizer.options, engine=engine, max_grad_norm=None, capture=False)
            self.stepper = optimizer.make_stepper(optimizer, options)

    @property
    def words(self) -> str:
        """How the optimizer steps, in words for messages."""
        return f"{'runs its own step' if self.stepper is None else 'is stepped as a whole'} ({self._reason})"

    def step(self, optimizer: Optimizer, work: Sequence[OffloadBucket], factor: float | None) -> None:
        """Step the masters, and make the new weights that are to be sent.

        Args:
            optimizer: The optimizer that has the masters.
            work: The buckets with gradients.
            factor: The factor by which gradients are multiplied; None: none.
        """
        masters = {p: master for bucket in work for p, master in zip(bucket.params, bucket.masters, strict=True)}
        stepped: list[Tensor] = []
        try:
            for bucket in work:
                bucket.sent.wait()
                for i in bucket.present:
                    master = bucket.masters[i]
                    grad = bucket.gradient(i).to(master.dtype)
                    master.grad = grad if factor is None else grad * factor
                    stepped.append(master)
            with torch.no_grad(), masters_in_place(optimizer, masters):
                if self.stepper is not None:
                    self.stepper.step()
                else:
                    # The step of the class, not of the instance: hooks and schedulers count the step that led here.
                    inspect.unwrap(type(optimizer).step)(optimizer)
        finally:
            for master in stepped:
                master.grad = None
        for bucket in work:
            for i in bucket.present if bucket.outgoing is not None else ():
                bucket.ships()[i].copy_(local(bucket.masters[i]))

    def report(
        self, optimizer: Optimizer, masters: Mapping[Tensor, Tensor], what: str, *, scaled: bool
    ) -> list[Decision]:
        """Which engine steps the masters, and why.

        Args:
            optimizer: The optimizer that has the masters.
            masters: The masters, by parameter.
            what: The masters, in words.
            scaled: Whether gradients are unscaled or clipped.
        """
        if self.stepper is None:
            return [Decision(what, f"{type(optimizer).__name__}'s own step", self._reason)]
        with masters_in_place(optimizer, masters):
            decisions = self.stepper.report(scaled=scaled)
        return [replace(d, bucket=f"{what} (all at once: {self._reason})") for d in decisions]


def has_own_step(optimizer: RuleOptimizer) -> bool:
    """Whether an optimizer's class has a step of its own, which may do anything."""
    return inspect.unwrap(type(optimizer).step) is not inspect.unwrap(RuleOptimizer.step)
