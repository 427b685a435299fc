"""Adds callbacks automatically to those trainings that use something of ours.

Lightning has no way for an optimizer or a schedule to say that its training needs a callback. Its entry points apply to
every Trainer in the environment, even if it does not use this package. So importing ``lightning_optim`` wraps the
function with which Lightning calls callbacks: when a fit starts and its optimizers exist, or when others replace them
later, the Trainer gets the callbacks that these need. Any other Trainer is left as it is.
"""

from __future__ import annotations

import logging
from functools import wraps
from types import ModuleType
from typing import Any

from lightning_optim.after_import import after_import
from lightning_optim.callbacks.roots import ROOTS, callback_class, make_known

#: Where each root of Lightning calls its callbacks.
CALLS = {f"{root}.trainer.call": root for root in ROOTS}

_log = logging.getLogger(__name__)


def join_trainings() -> None:
    """Make each fit get the callbacks that it needs, under each root of Lightning that is imported, now or later.

    And each LightningCLI know ours by their names.
    """
    for name in CALLS:
        after_import(name, wrap_calls)
    for root in ROOTS:
        after_import(f"{root}.cli", make_known)


def wrap_calls(call: ModuleType) -> None:
    """Make each fit of one root of Lightning get the callbacks that it needs.

    Args:
        call: The module ``trainer.call`` of that root.
    """
    stock = getattr(call, "_call_callback_hooks", None)
    if stock is None:
        _log.warning(
            "lightning-optim does not know this version of Lightning: give Trainers whose schedules lack total_steps, "
            "or with SAM, L-BFGS or Schedule-Free, callbacks=[FillTotalSteps(), RefuseWithoutReplay(), "
            "EvaluationWeights()] of lightning_optim.callbacks"
        )
        return
    if hasattr(stock, "_joins_trainings"):
        return

    @wraps(stock)
    def _call_callback_hooks(trainer: Any, hook_name: str, *args: Any, **kwargs: Any) -> Any:
        if hook_name in ("on_fit_start", "on_train_batch_start"):
            try:
                if hook_name == "on_fit_start" or _lacks_a_total(trainer):
                    _join(trainer, CALLS[call.__name__])
            except Exception:  # whatever it is, a Trainer that does not use this package has to run
                _log.warning("lightning-optim adds no callbacks to this Trainer", exc_info=True)
        return stock(trainer, hook_name, *args, **kwargs)

    _call_callback_hooks._joins_trainings = True  # type: ignore[attr-defined]
    call._call_callback_hooks = _call_callback_hooks  # type: ignore[attr-defined]


def _lacks_a_total(trainer: Any) -> bool:
    """Whether a callback has replaced a schedule, during training, by one of ours that has no total."""
    for config in trainer.lr_scheduler_configs:
        for one in (config.scheduler, *getattr(config.scheduler, "_schedulers", ())):  # torch's wrappers have these
            if getattr(one, "total_steps", 0) is None and not getattr(one, "awaits_total", True):
                return True
    return False


def _join(trainer: Any, root: str) -> None:
    """Put the callbacks that a training needs before all others, so that these see schedules that are ready."""
    needed = [_of_trainer(trainer, name) or callback_class(name, root)() for name in _needs(trainer)]
    if needed:
        others = [callback for callback in trainer.callbacks if not any(callback is one for one in needed)]
        trainer.callbacks = [*needed, *others]


def _needs(trainer: Any) -> list[str]:
    """The names of the callbacks without which a training of ours would fail, or go wrong."""
    # Imported here, so that importing this package stays light.
    from lightning_optim.control.evaluation_weights import evaluating_elsewhere
    from lightning_optim.control.replay.guard import guarded
    from lightning_optim.control.schedules.totals import configs_to_fill

    needs = {
        "FillTotalSteps": bool(configs_to_fill(trainer)),
        "RefuseWithoutReplay": bool(guarded(trainer)),
        "EvaluationWeights": bool(evaluating_elsewhere(trainer)),
    }
    return [name for name, needed in needs.items() if needed]


def _of_trainer(trainer: Any, name: str) -> Any:
    """The callback of a name that a Trainer has already, from its user or from an earlier fit."""
    ours = (callback for callback in trainer.callbacks if type(callback).__module__.startswith("lightning_optim."))
    return next((callback for callback in ours if type(callback).__name__ == name), None)
