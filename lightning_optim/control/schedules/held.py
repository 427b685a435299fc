"""Schedules that do not advance for steps that were left out.

With a loss scaler, a step whose gradients are infinite changes nothing, but Lightning advances the schedules all the
same. This module holds them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from lightning_optim.control.late import LateReader

Schedules = list[Any]


class HeldSchedules:
    """Holds the schedules of a Lightning ``Trainer`` back, by one step for each step that was left out.

    On the CPU a step that was left out is known at once. On CUDA the host reads the flag one step late, when the next
    step has been launched, so that the device's queue never runs dry. The delay is fixed, so that replicas agree.
    Schedules by epoch and by a monitored metric are not affected.
    """

    def __init__(self) -> None:
        self._held: Schedules = []
        self._flags = LateReader()
        self._restore: Callable[[], None] | None = None

    def after_step(self, trainer: Any, found_inf: Tensor) -> None:
        """Take note of a step, before Lightning advances the schedules.

        Args:
            trainer: ``lightning.pytorch.Trainer`` or ``pytorch_lightning.Trainer``, in automatic optimization.
            found_inf: Nonzero if the step was left out.
        """
        due = due_schedules(trainer)
        for schedules in self._left_out(found_inf, due):
            self._held += schedules
        if any(schedule in self._held for schedule in due):
            self._intercept(trainer.lightning_module, len(due))

    def release(self) -> None:
        """Forget what is held."""
        if self._restore is not None:
            self._restore()
        self._held = []
        self._flags.forget()

    def _left_out(self, found_inf: Tensor, due: Schedules) -> Iterator[Schedules]:
        """The schedules of each step that by now is known to have been left out."""
        for flag, schedules in self._flags.read(found_inf, due):
            if flag.item():
                yield schedules

    def _intercept(self, module: Any, calls: int) -> None:
        """Replace the module's ``lr_scheduler_step``, which is what Lightning calls next, ``calls`` times."""
        stock, own = module.lr_scheduler_step, module.__dict__.get("lr_scheduler_step")

        def restore() -> None:
            self._restore = None
            if own is None:
                del module.lr_scheduler_step
            else:
                module.lr_scheduler_step = own

        def lr_scheduler_step(scheduler: Any, metric: Any) -> None:
            nonlocal calls
            calls -= 1
            if calls == 0:
                restore()
            if scheduler in self._held:
                self._held.remove(scheduler)
            else:
                stock(scheduler, metric)

        module.lr_scheduler_step = lr_scheduler_step
        self._restore = restore


def due_schedules(trainer: Any) -> Schedules:
    """The schedules that Lightning is going to advance for the step that was just made."""
    if not trainer.lightning_module.automatic_optimization:
        return []
    batch = trainer.fit_loop.epoch_loop.batch_idx + 1
    return [
        config.scheduler
        for config in trainer.lr_scheduler_configs
        if config.interval == "step" and not config.reduce_on_plateau and batch % config.frequency == 0
    ]
