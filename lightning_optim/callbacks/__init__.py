"""Lightning callbacks: thin adapters over :mod:`lightning_optim.control`, imported on first use.

Lightning takes seconds to import, so a callback is imported only when its name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_optim.callbacks.roots import CALLBACKS, callback_class

if TYPE_CHECKING:
    from lightning_optim.callbacks.evaluation_weights import EvaluationWeights as EvaluationWeights
    from lightning_optim.callbacks.gradient_accumulation import GradientAccumulation as GradientAccumulation
    from lightning_optim.callbacks.gradient_clipping import GradientClipping as GradientClipping
    from lightning_optim.callbacks.loss_scaling import LossScaling as LossScaling
    from lightning_optim.callbacks.lr_finder import LRFinder as LRFinder
    from lightning_optim.callbacks.replay_guard import RefuseWithoutReplay as RefuseWithoutReplay
    from lightning_optim.callbacks.schedule_totals import FillTotalSteps as FillTotalSteps
    from lightning_optim.callbacks.spike_rollback import SpikeRollback as SpikeRollback
else:
    __all__ = list(CALLBACKS)


def __getattr__(name: str) -> Any:
    return callback_class(name, "lightning.pytorch")


def __dir__() -> list[str]:
    return sorted([*globals(), *CALLBACKS])
