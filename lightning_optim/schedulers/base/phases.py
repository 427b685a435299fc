"""The phases that schedules are made of: how far each has come, and the factor that this gives."""

from __future__ import annotations


def warmup_ramp(step: int, warmup_steps: int, warmup_start: float | None) -> float:
    """Linear rise of the factor during the warmup, ``step < warmup_steps``.

    Args:
        step: Steps made so far.
        warmup_steps: Steps that the warmup takes.
        warmup_start: The factor at step 0. ``None`` starts one increment above zero, ``1 / (warmup_steps +
            1)``.

    Returns:
        The factor; the ramp would reach 1 at ``step == warmup_steps``.

    Example:
        >>> [warmup_ramp(t, 4, None) for t in range(4)]
        [0.2, 0.4, 0.6, 0.8]
        >>> [warmup_ramp(t, 4, 0.0) for t in range(4)]
        [0.0, 0.25, 0.5, 0.75]
    """
    if warmup_start is None:
        return (step + 1) / (warmup_steps + 1)
    return warmup_start + (1 - warmup_start) * (step / warmup_steps)


def fraction_done(step: int, begin: int, end: int) -> float:
    """How much of the phase ``begin..end`` has passed, held at 1 after it.

    Example:
        >>> [fraction_done(t, 10, 14) for t in (10, 11, 14, 99)]
        [0.0, 0.25, 1.0, 1.0]
        >>> fraction_done(10, 10, 10)  # a phase without steps is over, not 0/0
        1.0
    """
    return 1.0 if step >= end else (step - begin) / (end - begin)


def above_floor(shape: float, min_lr_ratio: float) -> float:
    """Squeeze a shape that falls from 1 to 0 so that it falls from 1 to ``min_lr_ratio``, exact at both ends.

    Example:
        >>> above_floor(1.0, 0.1), above_floor(0.5, 0.1), above_floor(0.0, 0.1)
        (1.0, 0.55, 0.1)
    """
    return shape + min_lr_ratio * (1 - shape)


def steps_in(amount: int | float, total_steps: int) -> int:
    """Resolve an amount to steps: an int is a count, a float a fraction of ``total_steps``.

    Example:
        >>> steps_in(100, 2000), steps_in(0.07, 100)
        (100, 7)
    """
    return amount if isinstance(amount, int) else round(amount * total_steps)
