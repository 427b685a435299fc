"""Warmup, a stable plateau, then a short decay (WSD)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, get_args

from torch.optim import Optimizer

from lightning_optim.schedulers.base import Schedule
from lightning_optim.schedulers.base.options import Check, check_steps, one_of
from lightning_optim.schedulers.base.phases import above_floor, fraction_done, steps_in, warmup_ramp

Decay = Literal["1-sqrt", "linear", "cosine"]

# Shape of the decay against the part of it that is done; each falls from 1 to 0.
_SHAPES: dict[str, Callable[[float], float]] = {
    "1-sqrt": lambda done: 1 - math.sqrt(done),
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def wsd_factor(
    step: int,
    warmup_steps: int,
    total_steps: int,
    decay_steps: int,
    min_lr_ratio: float = 0.0,
    decay: Decay = "1-sqrt",
    warmup_start: float | None = None,
) -> float:
    """The multiple of the base learning rate: linear up to 1, constant, then down to ``min_lr_ratio``.

    Args:
        step: Steps made so far.
        warmup_steps: Steps of warmup; 0 for none.
        total_steps: Steps of the whole run; the factor stays constant from there on.
        decay_steps: The last steps of the run, in which the factor falls; 0 keeps it at 1.
        min_lr_ratio: Factor at the end.
        decay: Shape of the decay.
        warmup_start: Factor at step 0 of a warmup; ``None`` for ``1 / (warmup_steps + 1)``.

    Example:
        >>> [wsd_factor(t, warmup_steps=1, total_steps=8, decay_steps=4, decay="linear") for t in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    step = max(step, 0)
    if step < min(warmup_steps, total_steps):
        return warmup_ramp(step, warmup_steps, warmup_start)
    if decay_steps == 0:
        return 1.0
    # Where warmup and decay overlap, the warmup goes first. Rounded fractions may overlap, or a fraction and a count.
    decay_begin = max(warmup_steps, total_steps - decay_steps)
    if step < decay_begin and step < total_steps:
        return 1.0
    return above_floor(_SHAPES[decay](fraction_done(step, decay_begin, total_steps)), min_lr_ratio)


class WSD(Schedule):
    """Warmup–stable–decay: linear warmup, constant learning rate, then a decay over the last ``decay_steps``.

    The plateau does not depend on the length of the run, so that a run can be prolonged from any checkpoint
    taken on it: resume with a larger ``max_steps`` and the decay moves to the new end. ``decay="1-sqrt"``,
    with factor ``1 - sqrt(x)`` where ``x`` is the part of the decay that is done, was the best shape in
    Hägele et al., who find 10 to 20% of the run enough for the decay. The factor is constant from
    ``total_steps`` on.

    The warmup's factor is ``(t + 1) / (W + 1)`` for ``W`` warmup steps, so that the first optimizer step
    already moves the weights; ``warmup_start=0.0`` gives ``t / W``, whose first step has a learning rate of
    0.

    Args:
        optimizer: The optimizer whose groups are scheduled. Their ``initial_lr``, which an earlier schedule or a
            checkpoint has left there, or else their present ``lr``, is the base (peak) learning rate.
        warmup_steps: Warmup length: an int counts steps, a float in [0, 1) is a fraction of ``total_steps``.
        total_steps: ``step()`` calls in the whole run; ``None`` to have it filled in from the Lightning
            Trainer, or by :meth:`set_total_steps`.
        min_lr_ratio: Final learning rate as a fraction of the base, in [0, 1].
        decay_steps: Length of the decay at the end of the run, as ``warmup_steps``: an int counts steps, a
            float in [0, 1) is a fraction of ``total_steps``; 0 for none.
        decay: Shape of the decay: ``"1-sqrt"``, ``"linear"`` or ``"cosine"``.
        warmup_start: Factor at step 0 of a warmup, in [0, 1]; ``None`` for ``1 / (warmup_steps + 1)``.
        last_epoch: Index of the last step made; ``-1`` starts afresh.

    Raises:
        TypeError: ``optimizer`` is not a torch optimizer, or an option has the wrong type.
        ValueError: An option is outside its range, or the phases given in steps are together longer than
            ``total_steps``.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=8.0)
        >>> schedule = WSD(optimizer, warmup_steps=1, total_steps=8, decay_steps=4, decay="1-sqrt")
        >>> lrs = []
        >>> for _ in range(9):
        ...     lrs += schedule.get_last_lr()
        ...     optimizer.step()
        ...     schedule.step()
        >>> [round(lr, 2) for lr in lrs]
        [4.0, 8.0, 8.0, 8.0, 8.0, 4.0, 2.34, 1.07, 0.0]

    References:
        Hu et al., *MiniCPM*, https://arxiv.org/abs/2404.06395; Hägele et al., *Scaling Laws and
        Compute-Optimal Training Beyond Fixed Training Durations*, https://arxiv.org/abs/2405.18392.
    """

    checks: ClassVar[Mapping[str, Check]] = {
        **Schedule.checks,
        "decay_steps": check_steps,
        "decay": one_of(*get_args(Decay)),
    }

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | float = 0,
        total_steps: int | None = None,
        min_lr_ratio: float = 0.0,
        decay_steps: int | float = 0.2,
        decay: Decay = "1-sqrt",
        warmup_start: float | None = None,
        last_epoch: int = -1,
    ) -> None:
        self.decay: Decay = self.checked("decay", decay)
        self.decay_steps: int | float = self.checked("decay_steps", decay_steps)
        warmup = self.checked("warmup_steps", warmup_steps)
        if isinstance(warmup, float) and isinstance(self.decay_steps, float) and warmup + self.decay_steps > 1:
            raise ValueError(
                f"warmup_steps={warmup} and decay_steps={self.decay_steps} are fractions of the run "
                "and must not exceed 1 together"
            )
        super().__init__(
            optimizer,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            min_lr_ratio=min_lr_ratio,
            warmup_start=warmup_start,
            last_epoch=last_epoch,
        )

    def factor(self, step: int) -> float:
        """:func:`wsd_factor` at ``step``; see :meth:`Schedule.factor`."""
        total = self.known_total()
        return wsd_factor(
            step,
            steps_in(self.warmup_steps, total),
            total,
            steps_in(self.decay_steps, total),
            self.min_lr_ratio,
            self.decay,
            self.warmup_start,
        )

    def _misfit(self, total: int) -> str | None:
        # Only phases given in steps have to fit: where a fraction makes them overlap, wsd_factor shortens the decay.
        counts = {"warmup_steps": self.warmup_steps, "decay_steps": self.decay_steps}
        counts = {name: steps for name, steps in counts.items() if isinstance(steps, int)}
        if sum(counts.values()) > total:
            given = " + ".join(f"{name}={steps}" for name, steps in counts.items())
            return f"{given} must not exceed total_steps={total}"
        return None
