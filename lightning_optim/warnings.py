"""The one warning class of the package, so that users can filter or raise on it."""

from __future__ import annotations

import warnings

_seen: set[str] = set()


class LightningOptimWarning(UserWarning):
    """Something works, but not as fast or not quite as asked; the message names the reason."""


def warn_once(message: str, *, key: str | None = None, stacklevel: int = 3) -> None:
    """Warn the first time that ``key`` (default: the message itself) comes up in this process.

    Args:
        message: What happened, why, and what is done instead.
        key: Messages with the same key are one warning.
        stacklevel: As in :func:`warnings.warn`.
    """
    key = message if key is None else key
    if key in _seen:
        return
    _seen.add(key)
    warnings.warn(message, LightningOptimWarning, stacklevel=stacklevel)
