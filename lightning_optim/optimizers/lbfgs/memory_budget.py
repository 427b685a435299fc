"""How much of the host's memory L-BFGS may take, before any of it is taken."""

from __future__ import annotations

import math

from lightning_optim.checks import POSITIVE_FINITE, check_number
from lightning_optim.engines.host_memory import host_memory

_BUDGET = POSITIVE_FINITE.or_none().described("bytes, a fraction of the free RAM up to 1, or None for all of it")


def memory_limit(budget: int | float | None) -> tuple[float, str]:
    """How many bytes may be taken, and what sets this limit, in words.

    Args:
        budget: Bytes; a fraction up to 1 of the RAM that is free; None for all of it.

    Raises:
        ValueError: Not a positive number.
        TypeError: Not a number.

    >>> memory_limit(2e9)
    (2000000000.0, 'memory_budget=2000000000.0 allows 2.0 GB')
    """
    budget = check_number("LBFGS", "memory_budget", budget, _BUDGET)
    if budget is not None and budget > 1:
        return float(budget), f"memory_budget={budget!r} allows {show_bytes(budget)}"
    try:
        free = host_memory().free
    except RuntimeError:
        return math.inf, "the system does not say how much RAM is free"
    if budget is None:
        return float(free), f"{show_bytes(free)} are free"
    allowed = budget * free
    return allowed, f"memory_budget={budget!r} of the {show_bytes(free)} that are free allows {show_bytes(allowed)}"


def show_bytes(amount: float) -> str:
    """A number of bytes for people.

    >>> show_bytes(5.6e12), show_bytes(23e9), show_bytes(1200), show_bytes(12)
    ('5.6 TB', '23.0 GB', '1.2 kB', '12 B')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= size:
            return f"{amount / size:.1f} {unit}"
    return f"{amount:.0f} B"
