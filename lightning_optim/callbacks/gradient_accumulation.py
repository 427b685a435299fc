"""Gradient accumulation under a Trainer: windows by schedule, of their real length, weighted if asked for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from functools import cache, wraps
from typing import Any, Literal

from torch import Tensor

from lightning_optim.callbacks.roots import Callback
from lightning_optim.control.accumulation import Accumulator
from lightning_optim.control.replay.window import replaced
from lightning_optim.control.schedules.run_length import RunLength
from lightning_optim.control.schedules.windows import Windows
from lightning_optim.stepping.evaluations import request_of
from lightning_optim.warnings import warn_once


class GradientAccumulation(Callback):
    """Accumulate gradients over windows of batches, whose gradient is the mean over what they really have.

    It takes the place of the Trainer's ``accumulate_grad_batches`` and of ``GradientAccumulationScheduler``. An epoch's
    last window is divided by its own length; with ``weigh``, a step follows the gradient of the mean over all tokens
    (or whatever is counted) of the window, on all processes. ``estimated_stepping_batches`` and our schedules know the
    steps that there will be.

    Checkpoints have no gradients. A run that is resumed in the middle of a window makes the window's step with the
    batches that are left, and says so.

    Args:
        windows: How many batches make a step; or a dict of such numbers, by the epoch or optimizer step (from 0) at
            which they begin to hold. Before its first key, every batch makes a step.
        by: What the keys of the dict count: ``"epoch"`` or ``"step"``.
        weigh: Returns the weight of a batch: the number of tokens, say, that its loss is the mean of, as a number or a
            tensor with one element; or the name under which the batch has it, as a key or an attribute. None: all
            batches weigh the same.
        across_epochs: Whether windows run on over the ends of epochs, but for the last epoch's. If not, the last batch
            of every epoch makes a step.

    Raises:
        ValueError, WrongTypeError: An option is not valid; or (when a fit starts) the Trainer, its strategy, the
            optimizer or the module does not go with it; the message says what does.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_optim.callbacks import GradientAccumulation
        >>> accumulation = GradientAccumulation({0: 1, 1000: 2, 3000: 4}, by="step", weigh=lambda batch: len(batch[0]))
        >>> trainer = Trainer(callbacks=[accumulation], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        windows: int | dict[int, int] = 1,
        by: Literal["epoch", "step"] = "epoch",
        weigh: Callable[[Any], Any] | str | None = None,
        across_epochs: bool = False,
    ) -> None:
        self.accumulator = Accumulator(windows, by, weigh, across_epochs, name="GradientAccumulation")
        self._awaited = False  # whether the present batch has not been evaluated yet
        self._put_in_place: ExitStack | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies, without what is put in place in a fit under way."""
        return {**self.__dict__, "_put_in_place": None}

    @property
    def schedule(self) -> Windows:
        """The windows, for whoever counts the steps of a run."""
        return self.accumulator.windows

    @property
    def open_rest(self) -> int:
        """How many batches the open window still needs; 0 if none is open."""
        return self.accumulator.rest

    # -- what Lightning calls -----------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the training, and take over: before the optimizers and their schedules are made."""
        if stage != "fit":
            return
        _check(trainer, pl_module)
        self.accumulator.reset()
        self.accumulator.distributed = trainer.world_size > 1
        cls: type = type(trainer)
        before, loop = trainer.accumulate_grad_batches, trainer.fit_loop.epoch_loop
        self._put_in_place = stack = ExitStack()
        stack.callback(setattr, trainer, "accumulate_grad_batches", before)
        stack.callback(setattr, trainer, "__class__", cls)
        # The largest, for those who ask before training starts whether gradients are accumulated.
        trainer.accumulate_grad_batches = Window(self.schedule.longest)
        trainer.__class__ = _counting_windows(cls)
        stack.enter_context(replaced(pl_module, "training_step", self._noting(trainer, pl_module.training_step)))
        if self.schedule.across_epochs:
            should_accumulate = _across_epochs(trainer, loop._should_accumulate)
            stack.enter_context(replaced(loop, "_should_accumulate", should_accumulate))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say where windows are not what was asked for, and go on in the window that a checkpoint was saved in."""
        accumulator, batches = self.accumulator, trainer.num_training_batches
        _check_optimizers(trainer, accumulator)
        position = accumulator.resumed_at
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        trainer.accumulate_grad_batches = Window(position + accumulator.rest or self.schedule.longest, done - position)
        if position and trainer.is_global_zero:
            warn_once(
                f"GradientAccumulation: the checkpoint was saved after {position} of the {position + accumulator.rest} "
                f"batches of a window, and has no gradients: the next step is of the other {accumulator.rest} alone",
                key=f"GradientAccumulation resumes after {position}",
            )
        if batches < self.schedule.longest and not self.schedule.across_epochs and trainer.is_global_zero:
            warn_once(
                f"GradientAccumulation: an epoch has {batches} batches, and a window {self.schedule.longest}: every "
                "epoch ends with a step, of the batches that it has. With across_epochs=True windows run on over the "
                "ends of epochs"
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin a new window, unless windows run on."""
        if not self.schedule.across_epochs:
            self.accumulator.drop()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """See whether the batch begins a window, and whether it ends it."""
        if trainer.fit_loop._skip_backward:  # as in the epoch in which SWA renews statistics
            return
        left, ends = self._left(trainer, batch_idx)
        self.accumulator.begin(epoch=trainer.current_epoch, step=trainer.global_step, left=left, ends=ends)
        trainer.accumulate_grad_batches = Window(self.accumulator.length, batch_idx - self.accumulator.position)
        self._awaited = True

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the Trainer and the module as they were found."""
        self._take_back()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the Trainer and the module as they were found."""
        self._take_back()

    def state_dict(self) -> dict[str, Any]:
        """The window that is open, and the scale of the weights."""
        return self.accumulator.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.accumulator.load_state_dict(state_dict)

    # -- ours ---------------------------------------------------------------------------------------------------

    def _take_back(self) -> None:
        stack, self._put_in_place, self._awaited = self._put_in_place, None, False
        if stack is not None:
            stack.close()

    def _left(self, trainer: Any, batch_idx: int) -> tuple[int | None, bool]:
        """How many batches there are up to one that ends its window in any case, and whether this is it."""
        batches, last = trainer.num_training_batches, trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        more = 0 if not self.schedule.across_epochs else _epochs_left(trainer)
        known = math.isfinite(batches) and math.isfinite(more) and batches > batch_idx
        return int(batches - batch_idx + batches * more) if known else None, last and more == 0

    def _noting(self, trainer: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
        """A ``training_step`` that gives the batch its share. Strategies call it again if they replay a window."""

        @wraps(stock)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            output = stock(*args, **kwargs)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            loss = loss if isinstance(loss, Tensor) else None
            batch = next(iter((*args, *kwargs.values())), None)
            if self._awaited:
                self._awaited = False
                with getattr(trainer.strategy, "rescaling", nullcontext)():
                    self.accumulator.contribute(loss, batch, _trained(trainer))
            elif loss is not None:
                self.accumulator.again(loss, batch)
            return output

        return training_step


class Window(int):
    """The number of batches in a window, which as a modulus counts from the window's first batch.

    Lightning divides a loss by ``trainer.accumulate_grad_batches``, and by ``batch % trainer.accumulate_grad_batches``
    sees where windows begin, as do others: so this one number tells all of them about a window that begins anywhere.

    Args:
        length: The number of batches.
        first: The number, within the epoch, of the window's first batch; negative if that was in an earlier epoch.

    >>> window = Window(4, first=3)
    >>> [batch % window for batch in (3, 4, 7)], 2.0 / window
    ([0, 1, 0], 0.5)
    """

    first: int

    def __new__(cls, length: int, first: int = 0) -> Window:
        """See the class."""
        made = super().__new__(cls, length)
        made.first = first
        return made

    def __rmod__(self, batch: int) -> int:
        """How many batches come before this one in its window."""
        return (batch - self.first) % int(self)

    def __reduce__(self) -> Any:
        """Copy the number alone: a copy belongs to no window."""
        return int, (int(self),)


def _check(trainer: Any, module: Any) -> None:
    """Refuse trainings whose windows are, or would be, made by something else."""
    who, strategy = "GradientAccumulation", trainer.strategy
    if not module.automatic_optimization:
        raise ValueError(
            f"{who} with manual optimization, where the module decides when it steps; valid: "
            "lightning_optim.control.accumulation.Accumulator in its training_step"
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"{who} with Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}); valid: one of them"
        )
    # Lightning's own; a second one of ours no Trainer takes.
    if any(hasattr(callback, "get_accumulate_grad_batches") for callback in trainer.callbacks):
        raise ValueError(f"{who} with another callback that accumulates; valid: one of them")
    if strategy.handles_gradient_accumulation:
        raise ValueError(
            f"{who} under {type(strategy).__name__}, which accumulates by itself; valid: "
            "Trainer(accumulate_grad_batches=...), or another strategy"
        )
    if option := getattr(strategy, "step_in_backward", False):
        raise ValueError(
            f"{who} with step_in_backward={option!r}, which frees gradients; valid: step_in_backward=False"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise ValueError(
            f"{who} with training_step(dataloader_iter), whose batches are not known beforehand; valid: "
            "training_step(batch) or training_step(batch, batch_idx)"
        )


def _check_optimizers(trainer: Any, accumulator: Accumulator) -> None:
    """Refuse line searches where the losses that they compare would not belong to the gradients."""
    for optimizer in trainer.optimizers:
        if request_of(optimizer) != "loss_and_gradient":
            continue
        name, windows = type(optimizer).__name__.removesuffix("Optim"), accumulator.windows.longest
        if accumulator.weigh is not None:
            raise ValueError(
                f"GradientAccumulation: weigh={accumulator.weigh!r} with {name}, whose line search compares losses, "
                "and these are not weighted; valid: weigh=None, or another optimizer"
            )
        if windows > 1 and not getattr(trainer.strategy, "replays_windows", False):
            raise ValueError(
                f"GradientAccumulation: windows of {windows} batches with {name} under "
                f"{type(trainer.strategy).__name__}, which evaluates the last of them only; valid: strategy='in_graph'"
            )
        if windows > 1 and math.isinf(trainer.num_training_batches):
            raise ValueError(
                f"GradientAccumulation: windows of {windows} batches with {name}, and data whose length is not known: "
                "the last window may be shorter than its losses were divided by; valid: limit_train_batches=<a number>"
            )


def _epochs_left(trainer: Any) -> float:
    """How many epochs come after the present one; infinite if that is not known."""
    loop = trainer.fit_loop
    return math.inf if loop.max_epochs == -1 else max(0, loop.max_epochs - loop.epoch_progress.current.processed - 1)


def _across_epochs(trainer: Any, stock: Callable[[], bool]) -> Callable[[], bool]:
    """Lightning's method by that name, without the steps that it makes at the end of every epoch."""

    def should_accumulate() -> bool:
        loop = trainer.fit_loop
        return stock() if loop._skip_backward else not loop.epoch_loop._accumulated_batches_reached()

    return should_accumulate


@cache
def _counting_windows(cls: type[Any]) -> type[Any]:
    """A class of Trainers whose ``estimated_stepping_batches`` counts windows, whatever their lengths."""

    def estimated_stepping_batches(trainer: Any) -> float:
        stock: float = cls.estimated_stepping_batches.fget(trainer)  # this sets the data up, if need be
        if trainer.max_epochs == -1 or math.isinf(trainer.num_training_batches):
            return stock
        return RunLength.of_trainer(trainer).schedule_steps()

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**names, "estimated_stepping_batches": property(estimated_stepping_batches)})


def _trained(trainer: Any) -> Iterator[Tensor]:
    return (p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"])
