"""How many steps a learning-rate schedule makes in a training run, or in what remains of it.

Trainers bound a run by epochs or by optimizer steps, accumulate gradients over batches, and step a schedule
at every n-th batch or epoch. This module turns those bounds into the one number that a schedule needs. It
imports no trainer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_optim.control.schedules.windows import Windows


@dataclass(frozen=True)
class RunProgress:
    """How far a run has come.

    Args:
        epochs: Epochs that are over.
        batches: Batches of the next epoch that are over.
        steps: Optimizer steps made in all.
        rest: Batches that an open accumulation window still needs. Only :attr:`RunLength.windows` need it.
    """

    epochs: int = 0
    batches: int = 0
    steps: int = 0
    rest: int = 0

    @classmethod
    def of_trainer(cls, trainer: Any) -> RunProgress:
        """Where a Lightning ``Trainer`` is, when its training starts (from a checkpoint, maybe) or in an epoch.

        Args:
            trainer: ``lightning.pytorch.Trainer`` or ``pytorch_lightning.Trainer``.
        """
        loop = trainer.fit_loop
        batch = loop.epoch_loop.batch_progress
        # Before the first batch after a start, the loop counts the batches of the last epoch, whichever it was.
        in_epoch = loop.restarted_mid_epoch or batch.current.ready > batch.current.processed
        epochs, batches = trainer.current_epoch, batch.current.processed if in_epoch else 0
        if batches >= trainer.num_training_batches:
            # A checkpoint at the very end of an epoch, which Lightning counts in some cases as over.
            counted = loop.epoch_loop.restarted_on_train_batch_end and batch.is_last_batch
            epochs, batches = epochs if counted else epochs + 1, 0
        rest = next((one.open_rest for one in trainer.callbacks if hasattr(one, "open_rest")), 0)
        return cls(epochs, batches, trainer.global_step, rest)


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
        windows: Windows that depend on optimizer steps, or go on over the ends of epochs; they replace ``accumulate``.
    """

    max_epochs: int = -1
    max_steps: int = -1
    batches: int | None = None
    accumulate: Mapping[int, int] = field(default_factory=lambda: {0: 1})
    steps_on_last_batch: bool = True
    windows: Windows | None = None

    @classmethod
    def of_trainer(cls, trainer: Any) -> RunLength:
        """Read the bounds from a Lightning ``Trainer`` whose training data is set up.

        ``GradientAccumulationScheduler`` and our ``GradientAccumulation`` are followed. A loader that changes its
        length between epochs is taken to keep its first one.

        Args:
            trainer: ``lightning.pytorch.Trainer`` or ``pytorch_lightning.Trainer``.
        """
        accumulate, windows = {0: int(trainer.accumulate_grad_batches)}, None
        for callback in trainer.callbacks:
            # Callbacks are found by what they have, because each root of Lightning has its own classes.
            if hasattr(callback, "get_accumulate_grad_batches"):
                accumulate = {0: 1, **callback.scheduling}
            elif hasattr(callback, "open_rest"):
                windows = callback.schedule
        if windows is not None and windows.by == "epoch" and not windows.across_epochs:
            accumulate, windows = dict(windows.lengths), None
        return cls(
            max_epochs=trainer.max_epochs,
            max_steps=trainer.max_steps,
            batches=None if math.isinf(trainer.num_training_batches) else int(trainer.num_training_batches),
            accumulate=accumulate,
            steps_on_last_batch=not trainer.strategy.handles_gradient_accumulation,
            windows=windows,
        )

    def schedule_steps(self, interval: str = "step", frequency: int = 1, done: RunProgress = RunProgress()) -> int:
        """The number of learning rates that a schedule passes through while the run makes its further optimizer steps.

        That is one more than the ``step()`` calls *before the last optimizer step*. Where the last call falls
        on the last optimizer step, as it does with a frequency of 1, it is also the number of calls. Where it
        does not, as in a run that ends in the middle of an epoch, the last stretch still trains above the
        final learning rate.

        Lightning's ``frequency`` counts batches even under accumulation: the schedule steps after an
        optimizer step whose batch number in the epoch is a multiple of ``frequency``.

        Args:
            interval: ``"step"`` or ``"epoch"``.
            frequency: Batches (of those that make an optimizer step) or epochs between ``step()`` calls.
            done: How far the run has come already.

        Returns:
            A number of at least 1.

        Raises:
            ValueError: The run has no end, or no end that can be known in advance.

        Example:
            >>> RunLength(max_epochs=3, batches=10, accumulate={0: 4}).schedule_steps()
            9
            >>> RunLength(max_steps=25, batches=10).schedule_steps("epoch")
            3
            >>> RunLength(max_steps=25, batches=10).schedule_steps(done=RunProgress(epochs=1, batches=2, steps=12))
            13
        """
        if interval not in ("step", "epoch"):
            raise ValueError(f"interval={interval!r} must be 'step' or 'epoch'")
        if self.max_epochs == -1 and self.max_steps == -1:
            raise ValueError("the run has no end (max_epochs=-1 and max_steps=-1)")
        if self.batches is None and (self.windows is None or interval == "epoch" or self.max_steps == -1):
            return self._steps_without_length(interval, frequency, done)
        if self.windows is not None:
            return self._steps_of_windows(self.windows, interval, frequency, done)
        assert self.batches is not None  # noqa: S101 # it was handled above
        return self._steps_with_length(self.batches, interval, frequency, done)

    def _steps_without_length(self, interval: str, frequency: int, done: RunProgress) -> int:
        """Like :meth:`schedule_steps`, with epochs of unknown length: only the bound in the same unit helps."""
        if interval == "epoch" and self.max_epochs != -1:
            return max(1, math.ceil(self.max_epochs / frequency) - done.epochs // frequency)
        if interval == "step" and self.max_steps != -1:
            window = self._window(done.epochs)
            both = math.lcm(window, frequency)
            last = done.batches // window + max(1, self.max_steps - done.steps)  # optimizer step of the epoch
            return window * (last - 1) // both - done.batches // both + 1
        missing = "max_steps" if interval == "step" else "max_epochs"
        raise ValueError(
            f"the training data has no length, and the schedule's interval is {interval!r}, "
            f"so that {missing} is needed, but {missing}=-1"
        )

    def _steps_with_length(self, batches: int, interval: str, frequency: int, done: RunProgress) -> int:
        """Like :meth:`schedule_steps`, with ``batches`` batches in every epoch."""
        # Steps and calls are counted from the beginning of the epoch that is partly done.
        steps_done, calls_done = self._in_epoch(done.batches, batches, self._window(done.epochs), frequency)
        steps_left = math.inf if self.max_steps == -1 else self.max_steps - done.steps + steps_done
        last_epoch = math.inf if self.max_epochs == -1 else self.max_epochs
        begins = [done.epochs, *(begin for begin in sorted(self.accumulate) if begin > done.epochs)]
        calls = -calls_done
        for begin, end in zip(begins, [*begins[1:], math.inf], strict=True):
            window = self._window(begin)
            steps_per_epoch, calls_per_epoch = self._in_epoch(batches, batches, window, frequency)
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
                return (begin + full_epochs) // frequency - done.epochs // frequency + 1
            calls += full_epochs * calls_per_epoch + window * rest // math.lcm(window, frequency)
            return max(0, calls) + 1
        raise AssertionError("the last stretch has no end, so that the loop returns")

    def _steps_of_windows(self, windows: Windows, interval: str, frequency: int, done: RunProgress) -> int:
        """Like :meth:`schedule_steps`, going through the run from one change of the windows to the next."""
        batches = sys.maxsize if self.batches is None else self.batches
        most_steps = math.inf if self.max_steps == -1 else self.max_steps
        last_epoch = math.inf if self.max_epochs == -1 else self.max_epochs
        if batches == 0:
            return 1
        epoch, batch, step, last = done.epochs, done.batches, done.steps, done.epochs
        rest = done.rest if batch or windows.across_epochs else 0
        calls, calls_at_last = 0, 0  # steps of the schedule: in all, and at the last optimizer step so far
        while epoch < last_epoch and step < most_steps:
            goes_on = windows.across_epochs and epoch + 1 < last_epoch
            while batch < batches and step < most_steps:
                length = rest or windows.at(epoch, step)
                if goes_on and batch + length > batches:
                    rest, batch = batch + length - batches, batches
                    continue
                # Windows of one length, as many as there are: of an open or a shortened one there is one.
                many = int(min((batches - batch) // length, most_steps - step, windows.change_after(step) - step))
                count = 1 if rest else max(1, many)
                calls += _multiples(batch, length, count - 1, frequency)
                batch = min(batch + length * count, batches)
                calls_at_last = batch % frequency == 0
                calls += calls_at_last
                step, rest, last = step + count, 0, epoch
            epoch, batch = epoch + 1, 0
        if interval == "epoch":
            return last // frequency - done.epochs // frequency + 1
        return calls - calls_at_last + 1

    def _window(self, epoch: int) -> int:
        """Batches in an optimizer step of an epoch."""
        return self.accumulate[max(begin for begin in self.accumulate if begin <= epoch)]

    def _in_epoch(self, done: int, batches: int, window: int, frequency: int) -> tuple[int, int]:
        """Optimizer steps, and steps of the schedule, in the first ``done`` batches of an epoch of ``batches``."""
        steps, calls = done // window, done // math.lcm(window, frequency)
        if done == batches and batches % window and self.steps_on_last_batch:
            steps += 1
            calls += batches % frequency == 0
        return steps, calls


def _multiples(begin: int, stride: int, count: int, of: int) -> int:
    """How many of the numbers ``begin + stride``, ``begin + 2 * stride``, ... (``count`` of them) are multiples."""
    period = of // math.gcd(stride, of)
    first = next((n for n in range(1, period + 1) if (begin + stride * n) % of == 0), None)
    return 0 if first is None or first > count else (count - first) // period + 1
