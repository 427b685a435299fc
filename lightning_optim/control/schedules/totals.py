"""Telling schedules how many steps they make in a run, as :mod:`.run_length` counts them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR

from lightning_optim.control.schedules.run_length import RunLength, RunProgress
from lightning_optim.schedulers.base import Schedule
from lightning_optim.warnings import warn_once


def schedules_in(scheduler: object) -> Iterator[Schedule]:
    """Our schedules in ``scheduler``: itself, or those in a ``SequentialLR`` or ``ChainedScheduler``."""
    if isinstance(scheduler, Schedule):
        yield scheduler
    elif isinstance(scheduler, SequentialLR | ChainedScheduler):
        for inner in scheduler._schedulers:
            yield from schedules_in(inner)


def needs_total(scheduler: object) -> bool:
    """Whether a schedule in ``scheduler`` has a total that is unknown, or was filled in earlier."""
    return any(schedule.total_steps is None or schedule.total_is_filled for schedule in schedules_in(scheduler))


def fill_total(scheduler: object, total_steps: int) -> None:
    """Tell every schedule in ``scheduler`` how many steps it will make; totals given by the user stay.

    In a ``SequentialLR`` each schedule gets the distance between its milestones, and the last one what
    remains to ``total_steps``. A phase that the run does not reach gets 1. In a ``ChainedScheduler`` each
    gets the whole.

    Args:
        scheduler: A schedule of ours, or a torch wrapper around some; anything else is left alone.
        total_steps: ``step()`` calls of ``scheduler`` in the run.

    Example:
        >>> import torch
        >>> from lightning_optim.schedulers import Cosine, Linear
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> first, second = Linear(optimizer), Cosine(optimizer)
        >>> both = torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[30])
        >>> fill_total(both, 100)
        >>> first.total_steps, second.total_steps
        (30, 70)
    """
    if isinstance(scheduler, Schedule):
        if needs_total(scheduler):
            scheduler.set_total_steps(total_steps, filled=True)
    elif isinstance(scheduler, SequentialLR):
        bounds = [0, *scheduler._milestones, total_steps]
        for inner, begin, end in zip(scheduler._schedulers, bounds, bounds[1:], strict=False):
            fill_total(inner, max(1, end - begin))
        _refresh_last_lr(scheduler)
    elif isinstance(scheduler, ChainedScheduler):
        for inner in scheduler._schedulers:
            fill_total(inner, total_steps)
        _refresh_last_lr(scheduler)


def fill_trainer_totals(trainer: Any) -> None:
    """Fill the totals of all schedules of a Lightning ``Trainer``; call it when its training starts.

    A schedule's total is its own position plus what remains of the run, so that it ends with the run even if it has
    joined late, or began in another run. If the same run is resumed, the total that was filled in at its beginning
    stays, whatever has happened since (steps that a loss scaler left out, say).

    Nothing is done under manual optimization, where only the user knows how often a schedule is stepped.

    Args:
        trainer: ``lightning.pytorch.Trainer`` or ``pytorch_lightning.Trainer``, in ``fit`` with its data set up.

    Raises:
        ValueError: The length of the run cannot be known; the message names the limits to set.
    """
    configs = configs_to_fill(trainer)
    if not configs:
        return
    run, done = RunLength.of_trainer(trainer), RunProgress.of_trainer(trainer)
    for config in configs:
        try:
            whole = run.schedule_steps(config.interval, config.frequency)
            left = run.schedule_steps(config.interval, config.frequency, done)
        except ValueError as error:
            names = ", ".join(type(schedule).__name__ for schedule in schedules_in(config.scheduler))
            raise ValueError(
                f"Cannot fill total_steps of {names}: {error}. "
                "Set that limit on the Trainer, or give the schedule total_steps=<its step() calls in all>."
            ) from None
        position = _position(config.scheduler)
        if position == 0 and left == 1 and run.schedule_steps(config.interval, done=done) > 1:
            warn_once(
                f"The schedule never steps: frequency={config.frequency}, interval={config.interval!r}. "
                "A frequency counts epochs or batches, of the latter those that make an optimizer step "
                f"(accumulate_grad_batches={dict(run.accumulate)}, {run.batches} batches in an epoch)."
            )
        waiting = [schedule for schedule in schedules_in(config.scheduler) if needs_total(schedule)]
        if position <= whole - left and all(schedule.filled_for == whole for schedule in waiting):
            continue
        fill_total(config.scheduler, position + left)
        for schedule in waiting:
            schedule.filled_for = whole


class TotalsFiller:
    """The hooks of :class:`lightning_optim.callbacks.FillTotalSteps`, for a callback class of either Lightning."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Let schedules wait for their totals, for the sake of tuners that train before the training starts."""
        for config in configs_to_fill(trainer):
            for schedule in schedules_in(config.scheduler):
                schedule.await_total()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Fill the totals; see :func:`fill_trainer_totals`."""
        # Not earlier: setting up the data before the checkpoint's loops are restored would lose the position of a
        # stateful data loader.
        fill_trainer_totals(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Fill the totals of schedules that came during training, as when a callback replaces the optimizers."""
        schedules = (one for config in trainer.lr_scheduler_configs for one in schedules_in(config.scheduler))
        if any(schedule.total_steps is None and not schedule.awaits_total for schedule in schedules):
            fill_trainer_totals(trainer)


def configs_to_fill(trainer: Any) -> list[Any]:
    """The configurations of those schedules of a Lightning ``Trainer`` that need a total."""
    if not trainer.lightning_module.automatic_optimization:
        return []
    return [config for config in trainer.lr_scheduler_configs if needs_total(config.scheduler)]


def _position(scheduler: Any) -> int:
    """How many ``step()`` calls a schedule, or a wrapper around some, has had."""
    if isinstance(scheduler, ChainedScheduler):
        return _position(scheduler._schedulers[0])
    return int(scheduler.last_epoch)


def _refresh_last_lr(wrapper: LRScheduler) -> None:
    # A wrapper keeps its own copy of the learning rates, taken when it was built.
    groups = wrapper.optimizer.param_groups
    wrapper._last_lr = [group["lr"] + 0 for group in groups]
