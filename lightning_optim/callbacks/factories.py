"""Entry points that give every Lightning Trainer the callbacks that work without being asked for.

Lightning calls these in every ``Trainer(...)`` and lets their exceptions through, also for users who never
heard of this package. So they are cheap, import nothing that the calling root of Lightning has not imported,
and never raise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from typing import Any

_log = logging.getLogger(__name__)


def for_lightning() -> list[Any]:
    """Callbacks for ``lightning.pytorch.Trainer``, group ``lightning.pytorch.callbacks_factory``."""
    return _make({"FillTotalSteps": "schedule_totals", "RefuseWithoutReplay": "replay_guard"})


def for_pytorch_lightning() -> list[Any]:
    """Callbacks for ``pytorch_lightning.Trainer``, group ``pytorch_lightning.callbacks_factory``."""
    return _make(dict.fromkeys(("FillTotalSteps", "RefuseWithoutReplay"), "_pytorch_lightning"))


def _make(homes: Mapping[str, str]) -> list[Any]:
    """An instance of each class, by the module of this package that has it."""
    try:
        return [getattr(import_module(f"lightning_optim.callbacks.{home}"), name)() for name, home in homes.items()]
    except Exception:  # whatever it is, a Trainer that does not use this package has to be built
        _log.warning("lightning-optim adds no callbacks to this Trainer", exc_info=True)
        return []
