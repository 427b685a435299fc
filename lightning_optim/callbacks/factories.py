"""Where entry points of an earlier version lead: an editable installation keeps them until it is made anew.

They gave every Trainer in the environment two callbacks; now :mod:`lightning_optim.callbacks.joining` gives them to
those that need them.
"""

from __future__ import annotations

from typing import Any


def for_lightning() -> list[Any]:
    """No callbacks for ``lightning.pytorch.Trainer``."""
    return []


def for_pytorch_lightning() -> list[Any]:
    """No callbacks for ``pytorch_lightning.Trainer``."""
    return []
