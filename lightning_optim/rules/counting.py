"""Counting steps in float32, as state dicts have it, beyond the 2²⁴ that float32 can count to.

Further on, a counter goes to the next number that float32 has, so that no two steps have the same one: what rounding
noise is made from. As the number of steps it is then too high, which nothing notices where it is used as such: bias
corrections have long gone to 1.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

#: From here on float32 does not have every whole number.
COUNTABLE = float(1 << 24)


def float_bits(x: float) -> int:
    """The bits of the float32 nearest to a number."""
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def next_step(step: float) -> float:
    """The counter after ``step``, a number of float32.

    >>> next_step(3.0), next_step(2.0**24), next_step(2.0**25)
    (4.0, 16777218.0, 33554436.0)
    """
    return step + 1 if step < COUNTABLE or not math.isfinite(step) else _neighbour(step)


def _neighbour(step: float) -> float:
    return float(struct.unpack("<f", struct.pack("<I", float_bits(step) + 1))[0])


def previous(counter: Tensor) -> Tensor:
    """The counter one step ago, on any device and without waiting for it: the inverse of :func:`next_step`.

    >>> for step in (4.0, 2.0**24, 2.0**24 + 2, 2.0**25 + 4):
    ...     assert next_step(previous(torch.tensor(step)).item()) == step
    """
    before = torch.nextafter(counter, torch.zeros_like(counter))
    return torch.where(counter > COUNTABLE, before, counter - 1)


def advancing(counters: Sequence[Tensor]) -> list[Callable[[], object]]:
    """The calls that count one more step, in counters in host memory; each may be made again if it was cut short."""
    steps = [counter.item() for counter in counters]
    if max(steps, default=0.0) < COUNTABLE:
        return [partial(torch._foreach_add_, list(counters), 1)] if counters else []
    return [partial(counter.fill_, next_step(step)) for counter, step in zip(counters, steps, strict=True)]


def step_word(step: float) -> int:
    """32 bits that tell a step from all others: its number, or where float32 no longer counts, its bits."""
    return int(step) if step < COUNTABLE else float_bits(step)
