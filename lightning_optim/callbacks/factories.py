"""Entry points that give every Lightning Trainer the callbacks that work without being asked for.

Lightning calls these in every ``Trainer(...)`` and lets their exceptions through, also for users who never
heard of this package. So they are cheap, import nothing that the calling root of Lightning has not imported,
and never raise.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

_log = logging.getLogger(__name__)


def for_lightning() -> list[Any]:
    """Callbacks for ``lightning.pytorch.Trainer``, group ``lightning.pytorch.callbacks_factory``."""
    return _make("lightning_optim.callbacks.schedule_totals")


def for_pytorch_lightning() -> list[Any]:
    """Callbacks for ``pytorch_lightning.Trainer``, group ``pytorch_lightning.callbacks_factory``."""
    return _make("lightning_optim.callbacks._pytorch_lightning")


def _make(module: str) -> list[Any]:
    try:
        return [import_module(module).FillTotalSteps()]
    except Exception:  # whatever it is, a Trainer that does not use this package has to be built
        _log.warning("lightning-optim adds no callbacks to this Trainer", exc_info=True)
        return []
