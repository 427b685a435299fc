"""Short names of our Lightning strategies, as in ``Trainer(strategy="in_graph")``.

Lightning checks a strategy's name before it calls any entry point, so that nothing but an import can make a name
known in time. This module is light: a name stands for a function that imports the strategy when a Trainer asks for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import partial
from typing import Any

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


def register(*, wanted: bool = False) -> None:
    """Make the names known to each Lightning that is imported already, or to each that is installed.

    Args:
        wanted: Import those that are installed.
    """
    for root, home in ROOTS.items():
        name = f"{root}.strategies"
        if wanted and _installed(root):
            try:
                importlib.import_module(name)
            except ImportError:  # one that is broken must not keep the other from being used
                continue
        registry = getattr(sys.modules.get(name), "StrategyRegistry", None)
        if registry is None:
            continue
        for strategy, cls in STRATEGIES.items():
            if strategy not in registry:
                registry.register(strategy, partial(_make, home, cls), description=f"{home}.{cls}")


def _installed(root: str) -> bool:
    return importlib.util.find_spec(root.partition(".")[0]) is not None


def _make(home: str, cls: str, **options: Any) -> Any:
    return getattr(importlib.import_module(home), cls)(**options)
