"""How many steps a learning-rate schedule makes in a run, and telling the schedules so.

Trainers bound a run by epochs or by optimizer steps, accumulate gradients over batches, and step a schedule
at every n-th batch or epoch. This module turns those bounds into the one number that a schedule needs. It
imports no trainer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR

from lightning_optim.schedulers.base import Schedule
from lightning_optim.warnings import warn_once


@dataclass(frozen=True)
class RunLength:
    """The bounds of a training run, in the units that Lightning uses.

    Args:
        max_epochs: Epochs at most; -1 for no bound.
        max_steps: Optimizer steps at most; -1 for no bound.
        batches: Batches in an epoch; ``None`` if the loader has no length.
        accumulate: Batches in an optimizer step, as a mapping from the epoch at which a value begins to hold;
            ``{0: 4}`` is a constant 4.
        steps_on_last_batch: An epoch's last batch makes an optimizer step even if its window is not full.
    """

    max_epochs: int = -1
    max_steps: int = -1
    batches: int | None = None
    accumulate: Mapping[int, int] = field(default_factory=lambda: {0: 1})
    steps_on_last_batch: bool = True

    @classmethod
    def of_trainer(cls, trainer: Any) -> RunLength:
        """Read the bounds from a Lightning ``Trainer`` whose training data is set up.

        ``GradientAccumulationScheduler`` is followed. A loader that changes its length between epochs is
        taken to keep its first one.

        Args:
            trainer: ``lightning.pytorch.Trainer`` or ``pytorch_lightning.Trainer``.
        """
        accumulate = {0: trainer.accumulate_grad_batches}
        for callback in trainer.callbacks:
            # By its method rather than its class, of which each root of Lightning has its own.
            if hasattr(callback, "get_accumulate_grad_batches"):
                accumulate = {0: 1, **callback.scheduling}
        return cls(
            max_epochs=trainer.max_epochs,
            max_steps=trainer.max_steps,
            batches=None if math.isinf(trainer.num_training_batches) else int(trainer.num_training_batches),
            accumulate=accumulate,
            steps_on_last_batch=not trainer.strategy.handles_gradient_accumulation,
        )

    def schedule_steps(self, interval: str = "step", frequency: int = 1) -> int:
        """The number of learning rates that a schedule passes through while the run makes optimizer steps.

        That is one more than the ``step()`` calls *before the last optimizer step*. Where the last call falls
        on the last optimizer step, as it does with a frequency of 1, it is also the number of calls. Where it
        does not, as in a run that ends in the middle of an epoch, the last stretch still trains above the
        final learning rate.

        Lightning's ``frequency`` counts batches even under accumulation: the schedule steps after an
        optimizer step whose batch number in the epoch is a multiple of ``frequency``.

        Args:
            interval: ``"step"`` or ``"epoch"``.
            frequency: Batches (of those that make an optimizer step) or epochs between ``step()`` calls.

        Returns:
            A number of at least 1.

        Raises:
            ValueError: The run has no end, or no end that can be known in advance.

        Example:
            >>> RunLength(max_epochs=3, batches=10, accumulate={0: 4}).schedule_steps()
            9
            >>> RunLength(max_steps=25, batches=10).schedule_steps("epoch")
            3
        """
        if interval not in ("step", "epoch"):
            raise ValueError(f"interval={interval!r} must be 'step' or 'epoch'")
        if self.max_epochs == -1 and self.max_steps == -1:
            raise ValueError("the run has no end (max_epochs=-1 and max_steps=-1)")
        if self.batches is None:
            return self._steps_without_length(interval, frequency)
        return self._steps_with_length(self.batches, interval, frequency)

    def _steps_without_length(self, interval: str, frequency: int) -> int:
        """As :meth:`schedule_steps`, with epochs of unknown length: only the bound in the same unit helps."""
        if interval == "epoch" and self.max_epochs != -1:
            return max(1, math.ceil(self.max_epochs / frequency))
        if interval == "step" and self.max_steps != -1:
            window = self.accumulate[0]
            return window * max(0, self.max_steps - 1) // math.lcm(window, frequency) + 1
        missing = "max_steps" if interval == "step" else "max_epochs"
        raise ValueError(
            f"the training data has no length, and the schedule's interval is {interval!r}, "
            f"so that {missing} is needed, but {missing}=-1"
        )

    def _steps_with_length(self, batches: int, interval: str, frequency: int) -> int:
        """As :meth:`schedule_steps`, with ``batches`` batches in every epoch."""
        steps_left = math.inf if self.max_steps == -1 else self.max_steps
        last_epoch = math.inf if self.max_epochs == -1 else self.max_epochs
        begins = sorted(self.accumulate)
        calls = 0
        for begin, end in zip(begins, [*begins[1:], math.inf], strict=True):
            window = self.accumulate[begin]
            steps_per_epoch = -(-batches // window) if self.steps_on_last_batch else batches // window
            calls_per_epoch = batches // math.lcm(window, frequency)
            if self.steps_on_last_batch and batches % window and batches % frequency == 0:
                calls_per_epoch += 1
            if steps_per_epoch == 0:
                return 1
            epochs = max(0, min(end, last_epoch) - begin)
            if end < last_epoch and steps_per_epoch * epochs < steps_left:
                calls += int(epochs) * calls_per_epoch
                steps_left -= steps_per_epoch * int(epochs)
                continue
            # The run's last optimizer step is in this stretch of epochs: see where in it.
            steps = int(min(steps_left, steps_per_epoch * epochs))
            full_epochs, rest = divmod(max(0, steps - 1), steps_per_epoch)
            if interval == "epoch":
                return (begin + full_epochs) // frequency + 1
            return calls + full_epochs * calls_per_epoch + window * rest // math.lcm(window, frequency) + 1
        raise AssertionError("the last stretch has no end, so that the loop returns")


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

    Nothing is done under manual optimization, where only the user knows how often a schedule is stepped.

    Args:
        trainer: ``lightning.pytorch.Trainer`` or ``pytorch_lightning.Trainer``, in ``fit`` with its data set up.

    Raises:
        ValueError: The length of the run cannot be known; the message names the limits to set.
    """
    configs = _configs_to_fill(trainer)
    if not configs:
        return
    run = RunLength.of_trainer(trainer)
    for config in configs:
        try:
            steps = run.schedule_steps(config.interval, config.frequency)
        except ValueError as error:
            names = ", ".join(type(schedule).__name__ for schedule in schedules_in(config.scheduler))
            raise ValueError(
                f"Cannot fill total_steps of {names}: {error}. "
                "Set that limit on the Trainer, or give the schedule total_steps=<its step() calls in all>."
            ) from None
        if steps == 1 and run.schedule_steps(config.interval) > 1:
            warn_once(
                f"The schedule never steps: frequency={config.frequency}, interval={config.interval!r}. "
                "A frequency counts epochs or batches, of the latter those that make an optimizer step "
                f"(accumulate_grad_batches={dict(run.accumulate)}, {run.batches} batches in an epoch)."
            )
        fill_total(config.scheduler, steps)


class TotalsFiller:
    """The hooks of :class:`lightning_optim.callbacks.FillTotalSteps`, for a callback class of either Lightning."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Move to the front, so that every other callback sees schedules that are ready."""
        # A new list, because Lightning is iterating over the old one.
        trainer.callbacks = [self, *(callback for callback in trainer.callbacks if callback is not self)]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Let schedules wait for their totals, for the sake of tuners that train before the training starts."""
        for config in _configs_to_fill(trainer):
            for schedule in schedules_in(config.scheduler):
                schedule.await_total()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Fill the totals; see :func:`fill_trainer_totals`."""
        # Not earlier: setting up the data before the checkpoint's loops are restored would lose the position of a
        # stateful data loader.
        fill_trainer_totals(trainer)


def _configs_to_fill(trainer: Any) -> list[Any]:
    if not trainer.lightning_module.automatic_optimization:
        return []
    return [config for config in trainer.lr_scheduler_configs if needs_total(config.scheduler)]


def _refresh_last_lr(wrapper: LRScheduler) -> None:
    # A wrapper keeps its own copy of the learning rates, taken when it was built.
    groups = wrapper.optimizer.param_groups
    wrapper._last_lr = [group["lr"] + 0 for group in groups]
