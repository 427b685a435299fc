"""The one warning class of the package, so that users can filter or raise on it."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

#: Packages that may stand between a user's code and ours, whose frames are not the user's. Among them are modules of
#: the standard library that call functions they are given.
_BETWEEN = frozenset(
    {
        "lightning_optim",
        "torch",
        "lightning",
        "pytorch_lightning",
        "lightning_fabric",
        "lightning_utilities",
        "accelerate",
        "deepspeed",
        "transformers",
        "jsonargparse",
        "contextlib",
        "functools",
        "importlib",
        "copy",
        "pickle",
        "threading",
        "concurrent",
    }
)

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
    """Warn, pointing at the user's line: the one that called into this package, or into a framework that did.

    Args:
        message: What happened, and what is done instead.
        category: The warning's class.
    """
    frame = _users_frame(sys._getframe(1))
    # The line is given explicitly, since a stack level would not count frames of the import system.
    warnings.warn_explicit(
        message,
        category,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__") or "<unknown>",
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _users_frame(frame: FrameType) -> FrameType:
    """The innermost frame of a user's code; if there is none, as in a thread of ours, the frame that warns."""
    while frame.f_globals is globals() and frame.f_back is not None:
        frame = frame.f_back
    found: FrameType | None = frame
    while found is not None and _package(found) in _BETWEEN:
        found = found.f_back
    return frame if found is None else found


def _package(frame: FrameType) -> str:
    """The package of a frame's code, also if its module is run as a program (``python -m``)."""
    names = frame.f_globals
    name = names.get("__name__") or ""
    if name == "__main__":
        name = names.get("__package__") or getattr(names.get("__spec__"), "name", "")
    return str(name).partition(".")[0]
