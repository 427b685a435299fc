"""Lightning strategies: where the step runs, and what is done inside of it.

================================== ====================== =======================================================
class                              name                   is
================================== ====================== =======================================================
:class:`InGraphStrategy`           ``in_graph``           one device: the step stays in the device's queue
:class:`InGraphDDPStrategy`        ``in_graph_ddp``       the same on every device of Lightning's ``ddp``
:class:`InGraphFSDP2Strategy`      ``in_graph_fsdp2``     the same over parameters that ``fully_shard`` has divided
:class:`DetachedStrategy`          ``detached``           masters and state in host memory, where a kernel steps
:class:`DetachedDDPStrategy`       ``detached_ddp``       the same, masters and state divided over the processes
:class:`DetachedFSDP2Strategy`     ``detached_fsdp2``     the same over parameters that ``fully_shard`` has divided
:class:`DetachedDeepSpeedStrategy` ``detached_deepspeed`` DeepSpeed's ZeRO, with our optimizers
:class:`OptimAutoStrategy`         ``optim_auto``         ``in_graph`` or ``detached``, by what was measured
================================== ====================== =======================================================

Importing this package, or ``lightning_optim``, makes the names known to ``lightning`` and to ``pytorch_lightning``,
whichever is imported, before or after; it imports neither. The classes here are those for ``lightning``; those for
``pytorch_lightning`` are in :mod:`lightning_optim.strategies.pytorch_lightning`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_optim.strategy_names import STRATEGIES, register

if TYPE_CHECKING:
    from lightning_optim.strategies.lightning import (
        DetachedDDPStrategy,
        DetachedDeepSpeedStrategy,
        DetachedFSDP2Strategy,
        DetachedStrategy,
        InGraphDDPStrategy,
        InGraphFSDP2Strategy,
        InGraphStrategy,
        OptimAutoStrategy,
    )

__all__ = [
    "DetachedDDPStrategy",
    "DetachedDeepSpeedStrategy",
    "DetachedFSDP2Strategy",
    "DetachedStrategy",
    "InGraphDDPStrategy",
    "InGraphFSDP2Strategy",
    "InGraphStrategy",
    "OptimAutoStrategy",
]

register()


def __getattr__(name: str) -> Any:
    if name not in STRATEGIES.values():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.lightning"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
