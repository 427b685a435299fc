"""Step counters in float32, their type in state dicts, beyond the 2²⁴ that float32 can count to.

From there on, a counter advances to the next number that float32 has, so that no two steps have the same counter:
rounding noise is made from it. The counter is then larger than the number of steps, which does no harm: bias
corrections have long gone to 1.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

#: From here on float32 cannot represent every whole number.
COUNTABLE = float(1 << 24)


def float_bits(x: float) -> int:
    """The bits of the float32 nearest to a number."""
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def next_step(step: float) -> float:
    """The counter that follows ``step``; both are numbers that float32 has.

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
    """Calls that advance counters in host memory by one step; a call that was interrupted may be repeated."""
    steps = [counter.item() for counter in counters]
    if max(steps, default=0.0) < COUNTABLE:
        return [partial(torch._foreach_add_, list(counters), 1)] if counters else []
    return [partial(counter.fill_, next_step(step)) for counter, step in zip(counters, steps, strict=True)]


def step_word(step: float) -> int:
    """A 32-bit word that differs for all steps: the step's number or, where float32 no longer counts, its bits."""
    return int(step) if step < COUNTABLE else float_bits(step)
