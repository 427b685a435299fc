"""Judging the loss of every step of a Lightning training, under whatever strategy, and undoing steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.control.rollback.policy import Decision, LossSpikeError, UndoJudge
from lightning_optim.control.rollback.undo import Undo, why_not_undone
from lightning_optim.control.schedules.learning_rates import unknown_schedules
from lightning_optim.warnings import warn_once

#: The methods of a strategy that are replaced while steps are judged.
REPLACED = ("training_step", "optimizer_step")


class _LeftOut(Exception):  # noqa: N818 # no error: the way out of a step that has begun
    """Leaves a step that has asked for its gradients, because it is not made."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Owner(Protocol):
    """Who has steps judged.

    Attributes:
        judge: Decides about each loss.
        asked_for: What the user asked for, for messages.
        without: How the user can do without it, for messages.
    """

    judge: UndoJudge

    @property
    def asked_for(self) -> str: ...  # noqa: D102 # see the class

    @property
    def without(self) -> str: ...  # noqa: D102

    def is_on(self, trainer: Any) -> bool:
        """Whether steps are judged at the moment: tuners take callbacks out of the Trainer for their trials."""

    def say(self, trainer: Any, message: str) -> None:
        """Write a line into the log."""

    def warn(self, trainer: Any, message: str) -> None:
        """Warn once in a process."""


class JudgedSteps:
    """Stands around a strategy's ``training_step`` and ``optimizer_step`` until it is removed.

    Args:
        trainer: A Lightning ``Trainer`` whose optimizers exist.
        owner: Has the steps judged.

    Raises:
        ValueError: Steps of this training cannot be undone.
    """

    def __init__(self, trainer: Any, owner: Owner) -> None:
        self._trainer, self._owner = trainer, owner
        self._strategy: Any = trainer.strategy
        self._undo = self._new_undo()
        # Whether losses of the present window are noted, and whether it has begun.
        self._noting, self._window_began = True, False
        self._losses: list[Tensor] = []
        self._decision: Decision | None = None
        self._before = {method: self._strategy.__dict__.get(method) for method in REPLACED}
        self._stock = {method: getattr(self._strategy, method) for method in REPLACED}
        for method in REPLACED:
            setattr(self._strategy, method, _Replaced(self._strategy, method, getattr(self, f"_{method}")))

    def remove(self) -> None:
        """Give the strategy its own methods back, and free the snapshots."""
        for method, before in self._before.items():
            if before is None:
                self._strategy.__dict__.pop(method, None)
            else:
                setattr(self._strategy, method, before)
        self._undo.release()

    # -- in place of the strategy's -----------------------------------------------------------------------------

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Note the loss, and judge the loss of the window after its last batch."""
        stock = self._stock["training_step"]
        undo = self._at_work()
        if undo is None or not self._noting:
            return stock(*args, **kwargs)
        if not self._window_began:
            undo.begin_window()
            self._window_began = True
        output = stock(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())
        if not self._trainer.fit_loop._should_accumulate():
            drive = self._drive()
            early = drive is None or not drive.writes_in_backward
            self._decision = undo.judge(self._mean_loss(), self._trainer.global_step, background=early)
        return output

    def _optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Step as the strategy does, or undo steps."""
        stock = self._stock["optimizer_step"]
        undo = self._at_work()
        if undo is None:
            return stock(optimizer, closure, *args, **kwargs)

        def judged() -> Any:
            output = closure()
            if self._noting:  # the first evaluation; others are of the same batches, at other weights
                self._noting = False
                undo.wait()
                decision = self._decision
                if decision is not None and decision.leaves_out:
                    self._revert(undo, optimizer, decision)
                    raise _LeftOut(output)
                if decision is not None and decision.message:
                    self._owner.warn(self._trainer, decision.message)
            return output

        try:
            output = stock(optimizer, judged, *args, **kwargs)
        except _LeftOut as left_out:
            return left_out.output
        finally:
            self._new_window()
        undo.stepped()
        return output

    # -- ours ---------------------------------------------------------------------------------------------------

    def _at_work(self) -> Undo | None:
        # Lightning makes no backward passes while SWA renews the statistics of batch norms.
        if not self._owner.is_on(self._trainer) or getattr(self._trainer.fit_loop, "_skip_backward", False):
            return None
        if self._undo.optimizer is not self._strategy.optimizers[0]:  # callbacks may replace it between two steps
            self._undo.release()
            self._undo = self._new_undo()
        return self._undo

    def _new_undo(self) -> Undo:
        check_undo(self._trainer, self._owner)
        return Undo(
            self._owner.judge,
            self._trainer.lightning_module,
            self._strategy.optimizers[0],
            more=lambda: () if (drive := self._drive()) is None else drive.extra_tensors(),
            schedules=lambda: [config.scheduler for config in self._trainer.lr_scheduler_configs],
        )

    def _drive(self) -> Any:
        """What steps the optimizer under strategies of ours; None under others."""
        drive_of = getattr(self._strategy, "drive_of", None)
        return None if drive_of is None else drive_of(self._strategy.optimizers[0])

    def _new_window(self) -> None:
        self._noting, self._window_began = True, False
        self._losses, self._decision = [], None

    def _mean_loss(self) -> float | None:
        """The mean loss over the window and over all ranks; NaN if any loss is."""
        if not self._losses:
            return None
        losses = [loss.to(torch.promote_types(loss.dtype, torch.float32)) for loss in self._losses]
        return float(self._strategy.reduce(torch.stack(losses).mean(), reduce_op="mean"))

    def _revert(self, undo: Undo, optimizer: Optimizer, decision: Decision) -> None:
        message = decision.message
        # This comes first: it undoes updates that were made in the backward pass.
        optimizer.zero_grad()
        if not undo.revert(decision):
            message += (
                "; the weights stay, as there is no snapshot (the run was resumed after it, or the optimizer is new)"
            )
        if (drive := self._drive()) is not None:
            drive.undone(optimizer)
        if decision.action == "undo":
            self._owner.say(self._trainer, message)
        elif decision.action == "stop":
            self._owner.warn(self._trainer, message)
            self._trainer.should_stop = True
        else:
            raise LossSpikeError(message)


class _Replaced:
    """A function in the place of a strategy's method; a copy of the strategy, which nobody judges, gets its own."""

    def __init__(self, strategy: Any, method: str, function: Callable[..., Any]) -> None:
        self._strategy, self._method, self._function = strategy, method, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> Any:
        return getattr, (self._strategy, self._method)


def check_undo(trainer: Any, owner: Owner) -> None:
    """Refuse trainings whose steps cannot be undone.

    Raises:
        ValueError: They cannot; the message says why, and what is valid.
    """
    strategy, what, off = trainer.strategy, owner.asked_for, owner.without
    optimizers = strategy.optimizers
    options = getattr(strategy, "options", None)
    if not trainer.lightning_module.automatic_optimization:
        raise ValueError(f"{what} with manual optimization, where the module decides when it steps; valid: {off}")
    if len(optimizers) != 1:
        raise ValueError(f"{what} with {len(optimizers)} optimizers; valid: one optimizer, or {off}")
    if hasattr(strategy, "deepspeed_engine"):
        raise ValueError(f"{what} under DeepSpeed, whose engine has masters and state of its own; valid: {off}")
    if (reason := why_not_undone(optimizers[0])) is not None:
        raise ValueError(f"{what} with {reason}; valid: {off}")
    if how := getattr(strategy, "step_in_backward", False):
        raise ValueError(
            f"{what} with step_in_backward={how!r}: weights change before they are copied; valid: one of them"
        )
    if getattr(options, "delay_one_step", False):
        raise ValueError(f"{what} with delay_one_step=True, where a loss is of older weights; valid: one of them")
    if getattr(options, "clip", None) == "none":
        raise ValueError(
            f"{what} with clip='none', whose updates in the backward pass cannot be taken back; valid: clip='exact', "
            f"clip='speculative', or {off}"
        )
    if getattr(strategy, "capture", False):
        raise ValueError(f"{what} with capture=True has not been tried on a GPU; valid: one of them")
    for name in unknown_schedules([config.scheduler for config in trainer.lr_scheduler_configs]):
        warn_once(
            f"{what} multiplies the learning rates that {name} keeps by torch's names (base_lrs, eta_min, ...); if "
            "it keeps them elsewhere, its next step takes the multiplication back"
        )
