"""What may be meant by a name that nobody has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The valid name that is most like ``name``, whatever its capitals; None if none is.

    Args:
        name: What was written.
        valid: All that could have been.
        cutoff: How alike they must be, from 0 to 1, which is the same.

    >>> closest("adamww", ["Adam", "AdamW", "Lion"])
    'AdamW'
    """
    by_lower = {one.lower(): one for one in valid}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


def did_you_mean(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint in brackets, to be appended to an error; empty if no valid name is close to ``name``.

    >>> did_you_mean("weight_deacy", ["lr", "weight_decay"])
    " (did you mean 'weight_decay'?)"
    """
    close = closest(name, valid, cutoff)
    return "" if close is None else f" (did you mean {close!r}?)"
