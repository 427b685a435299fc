"""Which exceptions are about what the user wrote, so that their message is enough, without a traceback."""

from __future__ import annotations

import re
from types import TracebackType

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import StrategyRegistry

from lightning_optim.cli.complaints import in_one_line
from lightning_optim.hints import closest
from lightning_optim.strategy_names import STRATEGIES

#: The packages whose checks of arguments raise clear messages, and the exceptions that they raise.
_CHECKING: dict[str, tuple[type[Exception], ...]] = {
    "lightning_optim": (ValueError, TypeError),
    "torch.optim": (ValueError, TypeError),
    "jsonargparse": (ValueError, TypeError),
    "lightning.pytorch.cli": (RuntimeError,),  # about a config.yaml that another run has left
    "lightning": (ValueError, FileNotFoundError),
}

#: The packages that such an exception may have passed through. If other code took part, its author needs the traceback;
#: and once the loops advance, it is the training that fails.
_PASSING = (*_CHECKING, "torch", "lightning_utilities", "contextlib", "functools")
_LOOPS = "lightning.pytorch.loops"


def is_of_the_user(error: Exception) -> bool:
    """Whether an exception was raised by a check of arguments, before the training began."""
    frames = _frames(error.__traceback__)
    if any(_is_in(module, _LOOPS) and function == "advance" for module, function in frames):
        return False
    if not all(_is_in(module, *_PASSING) for module, _ in frames):
        return False
    if isinstance(error, MisconfigurationException):
        return True
    raising, _ = frames[-1]
    return any(_is_in(raising, home) and isinstance(error, kinds) for home, kinds in _CHECKING.items())


def in_words(error: Exception) -> str:
    """The message of such an exception; if jsonargparse has wrapped it into its own, the line that counts."""
    return in_one_line(str(error), (), lambda option, name: "")


def of_strategy(message: str) -> str | None:
    """Lightning's message about a strategy's name, with the names that we have; None for any other message."""
    found = re.search(r"invalid strategy name: `strategy='([^']*)'`", message)
    if found is None:
        return None
    strategy = found[1]
    # Lightning takes names from its registry; a class is given by its path.
    known = {name: name for name in ("auto", *StrategyRegistry.available_strategies())}
    known |= {cls: f"lightning_optim.strategies.{cls}" for cls in STRATEGIES.values()}
    close = closest(strategy, known)
    hint = f" (did you mean {known[close]!r}?)" if close else ""
    return (
        f"strategy={strategy!r} is no strategy{hint}; valid: {', '.join(STRATEGIES)}; a name of Lightning's, "
        "such as auto, ddp or fsdp; or the path of a class"
    )


def _frames(traceback: TracebackType | None) -> list[tuple[str, str]]:
    """Module and function of each frame that an exception has passed through; the last one has raised it."""
    found = []
    while traceback is not None:
        frame = traceback.tb_frame
        found.append((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        traceback = traceback.tb_next
    return found


def _is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
