"""The one warning class of the package, so that users can filter or raise on it."""

from __future__ import annotations

import sys
import warnings

_seen: set[str] = set()


class LightningOptimWarning(UserWarning):
    """Something works, but not as fast or not quite as asked; the message names the reason."""


def warn_once(message: str, *, key: str | None = None) -> None:
    """Warn the first time that ``key`` (default: the message itself) comes up in this process.

    Args:
        message: What happened, why, and what is done instead.
        key: Messages with the same key are one warning.

    The warning points at the user's line: see :func:`warn_user`.
    """
    key = message if key is None else key
    if key in _seen:
        return
    _seen.add(key)
    warn_user(message, LightningOptimWarning)


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, pointing at the user's line: the first caller outside of this package and of torch.

    Args:
        message: What happened, and what is done instead.
        category: The warning's class.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("lightning_optim", "torch.")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
