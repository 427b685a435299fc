"""Short names of our Lightning strategies, as in ``Trainer(strategy="in_graph")``.

Lightning asks nobody for a name that it does not have, so that only an import can make a name known in time:
``import lightning_optim``, before Lightning's own or after it. This module is light: a name stands for a
function that imports the strategy when a Trainer asks for it.
"""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType
from typing import Any

from lightning_optim.after_import import after_import

#: Name -> class, which each module of :data:`ROOTS` has.
STRATEGIES = {
    "in_graph": "InGraphStrategy",
    "in_graph_ddp": "InGraphDDPStrategy",
    "in_graph_fsdp2": "InGraphFSDP2Strategy",
    "detached": "DetachedStrategy",
    "detached_ddp": "DetachedDDPStrategy",
    "detached_fsdp2": "DetachedFSDP2Strategy",
    "optim_auto": "OptimAutoStrategy",
    "detached_deepspeed": "DetachedDeepSpeedStrategy",
}

#: The packages by which one may have Lightning, whose classes differ -> where ours for each are.
ROOTS = {
    "lightning.pytorch": "lightning_optim.strategies.lightning",
    "pytorch_lightning": "lightning_optim.strategies.pytorch_lightning",
}


def register() -> None:
    """Make the names known to each Lightning that is imported already, and to each that will be."""
    for root in ROOTS:
        after_import(f"{root}.strategies", _register)


def _register(strategies: ModuleType) -> None:
    registry, home = strategies.StrategyRegistry, ROOTS[strategies.__name__.removesuffix(".strategies")]
    for name, cls in STRATEGIES.items():
        if name not in registry:
            registry.register(name, partial(_make, home, cls), description=f"{home}.{cls}")


def _make(home: str, cls: str, **options: Any) -> Any:
    return getattr(importlib.import_module(home), cls)(**options)
