"""Lightning callbacks: thin adapters over :mod:`lightning_optim.control`, imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_optim.callbacks.replay_guard import RefuseWithoutReplay
    from lightning_optim.callbacks.schedule_totals import FillTotalSteps

__all__ = ["FillTotalSteps", "RefuseWithoutReplay"]

# Name -> module of this package. Lightning takes seconds to import, so that a name is looked up when it is
# asked for.
_HOMES = {"FillTotalSteps": "schedule_totals", "RefuseWithoutReplay": "replay_guard"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
