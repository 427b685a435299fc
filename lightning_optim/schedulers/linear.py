"""Linear warmup, then linear decay."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_optim.schedulers.base import Schedule
from lightning_optim.schedulers.base.phases import above_floor, fraction_done, steps_in, warmup_ramp


def linear_factor(
    step: int,
    warmup_steps: int,
    total_steps: int,
    min_lr_ratio: float = 0.0,
    warmup_start: float | None = None,
) -> float:
    """The multiple of the base learning rate: linear up to 1, then linear down to ``min_lr_ratio``.

    Args:
        step: Steps made so far.
        warmup_steps: Steps of warmup; 0 for none.
        total_steps: Steps of the whole run, warmup included; the factor stays constant from there on.
        min_lr_ratio: Factor at the end.
        warmup_start: Factor at step 0 of a warmup; ``None`` for ``1 / (warmup_steps + 1)``.

    Example:
        >>> [linear_factor(t, warmup_steps=1, total_steps=5) for t in range(7)]
        [0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    step = max(step, 0)
    if step < min(warmup_steps, total_steps):
        return warmup_ramp(step, warmup_steps, warmup_start)
    return above_floor(1 - fraction_done(step, warmup_steps, total_steps), min_lr_ratio)


class Linear(Schedule):
    """Linear warmup to the base learning rate, then linear decay to ``min_lr_ratio`` of it.

    With ``W`` warmup steps and ``T`` total steps, the factor after the warmup is ``(T - t) / (T - W)``,
    squeezed above ``min_lr_ratio``, and constant from ``T`` on. Not to be confused with
    ``torch.optim.lr_scheduler.LinearLR``, which interpolates between two factors and holds the second.

    The warmup's factor is ``(t + 1) / (W + 1)``, so that the first optimizer step already moves the weights;
    ``warmup_start=0.0`` gives ``t / W``, the convention of Hugging Face, whose first step has a learning rate
    of 0.

    Args:
        optimizer: The optimizer whose groups are scheduled. Their ``initial_lr``, which an earlier schedule or a
            checkpoint has left there, or else their present ``lr``, is the base (peak) learning rate.
        warmup_steps: Warmup length: an int counts steps, a float in [0, 1) is a fraction of ``total_steps``.
        total_steps: ``step()`` calls in the whole run, warmup included; ``None`` to have it filled in from
            the Lightning Trainer, or by :meth:`set_total_steps`.
        min_lr_ratio: Final learning rate as a fraction of the base, in [0, 1].
        warmup_start: Factor at step 0 of a warmup, in [0, 1]; ``None`` for ``1 / (warmup_steps + 1)``.
        last_epoch: Index of the last step made; ``-1`` starts afresh.

    Raises:
        TypeError: ``optimizer`` is not a torch optimizer, or an option has the wrong type.
        ValueError: An option is outside its range, or the warmup is longer than ``total_steps``.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=8.0)
        >>> schedule = Linear(optimizer, warmup_steps=1, total_steps=5)
        >>> lrs = []
        >>> for _ in range(6):
        ...     lrs += schedule.get_last_lr()
        ...     optimizer.step()
        ...     schedule.step()
        >>> lrs
        [4.0, 8.0, 6.0, 4.0, 2.0, 0.0]

    References:
        Goyal et al., *Accurate, Large Minibatch SGD* (warmup), https://arxiv.org/abs/1706.02677;
        Bergsma et al., *Straight to Zero* (linear decay), https://arxiv.org/abs/2502.15938.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int | float = 0,
        total_steps: int | None = None,
        min_lr_ratio: float = 0.0,
        warmup_start: float | None = None,
        last_epoch: int = -1,
    ) -> None:
        super().__init__(
            optimizer,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            min_lr_ratio=min_lr_ratio,
            warmup_start=warmup_start,
            last_epoch=last_epoch,
        )

    def factor(self, step: int) -> float:
        """:func:`linear_factor` at ``step``; see :meth:`Schedule.factor`."""
        total = self.known_total()
        return linear_factor(step, steps_in(self.warmup_steps, total), total, self.min_lr_ratio, self.warmup_start)
