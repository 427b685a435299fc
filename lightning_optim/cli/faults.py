"""Which exceptions are about what the user wrote, so that their message says more than a page of traceback above it."""

from __future__ import annotations

import difflib
from types import TracebackType
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import StrategyRegistry

from lightning_optim.strategy_names import STRATEGIES

#: Whose checks of their arguments speak for themselves, and by which exceptions.
_CHECKING: dict[str, tuple[type[Exception], ...]] = {
    "lightning_optim": (ValueError, TypeError),
    "torch.optim": (ValueError, TypeError),
    "jsonargparse": (ValueError, TypeError),
    "lightning.pytorch.cli": (RuntimeError,),  # about a config.yaml that another run has left
    "lightning": (ValueError, FileNotFoundError),
}

#: What else an exception may pass through on its way. If code of anybody else's had a part in it, its author needs to
#: see where; and once the loops run, it is the training that fails.
_PASSING = (*_CHECKING, "torch", "lightning_utilities", "contextlib", "functools")
_RUNNING = "lightning.pytorch.loops"


def is_of_the_user(error: Exception) -> bool:
    """Whether an exception was raised by a check of arguments, before the training began."""
    modules = _modules(error.__traceback__)
    if any(_is_in(module, _RUNNING) or not _is_in(module, *_PASSING) for module in modules):
        return False
    if isinstance(error, MisconfigurationException):
        return True
    return any(_is_in(modules[-1], home) and isinstance(error, kinds) for home, kinds in _CHECKING.items())


def told(error: Exception, strategy: Any) -> str:
    """The message of such an exception, with a hint if the name of the strategy is wrong.

    Args:
        error: The exception.
        strategy: What the Trainer was given.
    """
    message = str(error)
    if not isinstance(strategy, str) or "invalid strategy name" not in message:
        return message
    # Lightning knows its classes, and others, by names alone.
    known = {name: name for name in ("auto", *StrategyRegistry.available_strategies())}
    known |= {cls: f"lightning_optim.strategies.{cls}" for cls in STRATEGIES.values()}
    by_lower = {name.lower(): meant for name, meant in known.items()}
    close = difflib.get_close_matches(strategy.lower(), by_lower, n=1)
    hint = f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
    return (
        f"--trainer.strategy {strategy} is no strategy{hint}; valid: {', '.join(STRATEGIES)}; a name of Lightning's, "
        "such as auto, ddp or fsdp; or the path of a class"
    )


def _modules(traceback: TracebackType | None) -> list[str]:
    """Of the frames that an exception has passed, the last one where it was raised."""
    found = []
    while traceback is not None:
        found.append(traceback.tb_frame.f_globals.get("__name__", ""))
        traceback = traceback.tb_next
    return found


def _is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
