"""The callbacks for ``pytorch_lightning.Trainer``: see :mod:`lightning_optim.callbacks.roots`."""

from __future__ import annotations

from typing import Any

from lightning_optim.callbacks.roots import callback_class


def __getattr__(name: str) -> Any:
    return callback_class(name, "pytorch_lightning")
