"""Undoing steps after which the loss spikes, in all our strategies, by :mod:`lightning_optim.control.rollback.undo`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.control.rollback.policy import Decision, LossSpikeError, UndoJudge, UndoPolicy
from lightning_optim.control.rollback.undo import Undo, why_not_undone
from lightning_optim.control.schedules.learning_rates import unknown_schedules
from lightning_optim.warnings import warn_once

if TYPE_CHECKING:
    from lightning_optim.strategies.drive import Drive

#: Stands for the base class that comes after this one: a strategy of Lightning's, of either root.
_Strategy: Any = object


class _LeftOut(Exception):  # noqa: N818 # no error: the way out of a step that has begun
    """Leaves a step that has asked for its gradients, because it is not made."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Undoes(_Strategy):
    """Judges the loss of every step before it is made, and undoes the one before it if it spikes.

    Args:
        *args: Arguments of the Lightning strategy.
        undo: Whether to undo steps, and how: see :class:`~lightning_optim.control.rollback.policy.UndoPolicy`.
        **kwargs: Arguments of the Lightning strategy.

    Raises:
        TypeError: ``undo`` is something else, or has an unknown option.
        ValueError: An option is out of its range, or (in ``setup``) steps of the training cannot be undone.
    """

    root: ClassVar[str]
    strategy_name: str

    def __init__(self, *args: Any, undo: bool | dict[str, Any] | UndoPolicy = False, **kwargs: Any) -> None:
        policy = UndoPolicy.of(undo)
        super().__init__(*args, **kwargs)
        self.undo = policy
        self._undo: Undo | None = None
        # Whether losses of the present window are noted, and whether it has begun.
        self._noting, self._window_began = True, False
        self._losses: list[Tensor] = []
        self._decision: Decision | None = None

    # -- what Lightning calls -----------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Give the Trainer the callback that saves in checkpoints what a resumed run has to know."""
        super().setup_environment()
        trainer = self._trainer
        if self.undo is not None and trainer.state.fn == "fit" and self._judge is None:
            # At the front, so that others see what it logs. A new list, as Lightning may be iterating over the old one.
            trainer.callbacks = [_new_keeper(self.root, UndoJudge(self.undo)), *trainer.callbacks]

    def setup(self, trainer: Any) -> None:
        """Set up as Lightning's own strategy does, then check that steps can be undone."""
        super().setup(trainer)
        if self.undo is not None and trainer.state.fn == "fit":
            self._check_undo(trainer)
            self._new_undo(self.optimizers[0])

    def on_train_start(self) -> None:
        """Begin a new window."""
        super().on_train_start()
        self._new_window()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Note the loss, and judge the loss of the window after its last batch."""
        undo = self._at_work
        if undo is None or not self._noting:
            return super().training_step(*args, **kwargs)
        if not self._window_began:
            undo.begin_window()
            self._window_began = True
        output = super().training_step(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())
        if not self._trainer.fit_loop._should_accumulate():
            early = not self._drive(self.optimizers[0]).writes_in_backward
            self._decision = undo.judge(self._mean_loss(), self._trainer.global_step, background=early)
        return output

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step as other strategies do, or undo steps."""
        undo = self._at_work
        if undo is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)

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
                    self._warn(decision.message)
            return output

        try:
            output = super().optimizer_step(optimizer, judged, model, **kwargs)
        except _LeftOut as left_out:
            return left_out.output
        finally:
            self._new_window()
        undo.stepped()
        return output

    def teardown(self) -> None:
        """Free the snapshots."""
        self._release_undo()
        super().teardown()

    # -- ours ---------------------------------------------------------------------------------------------------

    @property
    def undo_records(self) -> list[dict[str, Any]]:
        """What was decided about each spike: dicts of primitives, fit for lines of JSON."""
        return [] if self._judge is None else [dict(record) for record in self._judge.records]

    @property
    def _judge(self) -> UndoJudge | None:
        """The judge in the Trainer's callbacks, which change from fit to fit; tuners remove them for their trials."""
        callbacks = () if self.lightning_module is None else self._trainer.callbacks
        return next((callback.judge for callback in callbacks if isinstance(callback, _Keeper)), None)

    @property
    def _at_work(self) -> Undo | None:
        if self._undo is None or self._judge is None or self._skips_backward():
            return None
        if self._undo.optimizer is not self.optimizers[0]:  # callbacks may replace it between two steps
            self._check_undo(self._trainer)
            self._new_undo(self.optimizers[0])
        return self._undo

    def _new_undo(self, optimizer: Optimizer) -> None:
        self._release_undo()
        assert self._judge is not None  # noqa: S101 # `setup_environment` made it
        self._undo = Undo(
            self._judge,
            self.lightning_module,
            optimizer,
            more=lambda: self._drive(optimizer).extra_tensors(),
            schedules=lambda: [config.scheduler for config in self._trainer.lr_scheduler_configs],
        )

    def _new_window(self) -> None:
        self._noting, self._window_began = True, False
        self._losses, self._decision = [], None

    def _mean_loss(self) -> float | None:
        """The mean loss over the window and over all ranks; NaN if any loss is."""
        if not self._losses:
            return None
        losses = [loss.to(torch.promote_types(loss.dtype, torch.float32)) for loss in self._losses]
        return float(self.reduce(torch.stack(losses).mean(), reduce_op="mean"))

    def _revert(self, undo: Undo, optimizer: Optimizer, decision: Decision) -> None:
        message = decision.message
        # This comes first: it undoes updates that were made in the backward pass.
        optimizer.zero_grad()
        if not undo.revert(decision):
            message += (
                "; the weights stay, as there is no snapshot (the run was resumed after it, or the optimizer is new)"
            )
        drive: Drive = self._drive(optimizer)
        drive.undone(optimizer)
        if decision.action == "undo":
            import_module(f"{self.root}.utilities.rank_zero").rank_zero_info(f"{self.strategy_name}: {message}")
        elif decision.action == "stop":
            self._warn(message)
            self._trainer.should_stop = True
        else:
            raise LossSpikeError(message)

    def _warn(self, message: str) -> None:
        if self.is_global_zero:
            warn_once(f"{self.strategy_name}: {message}")

    def _release_undo(self) -> None:
        if self._undo is not None:
            self._undo.release()
            self._undo = None

    def _check_undo(self, trainer: Any) -> None:
        """Refuse trainings whose steps cannot be undone."""
        off = "valid: undo=False"
        if not trainer.lightning_module.automatic_optimization:
            raise ValueError(f"undo with manual optimization, where the module decides when it steps; {off}")
        if len(self.optimizers) != 1:
            raise ValueError(f"undo with {len(self.optimizers)} optimizers; valid: one optimizer, or undo=False")
        if (reason := why_not_undone(self.optimizers[0])) is not None:
            raise ValueError(f"undo with {reason}; {off}")
        if getattr(self, "step_in_backward", False):
            how = self.step_in_backward
            raise ValueError(
                f"undo with step_in_backward={how!r}: weights change before they are copied; valid: one of them"
            )
        if getattr(getattr(self, "options", None), "delay_one_step", False):
            raise ValueError("undo with delay_one_step=True, where a loss is of older weights; valid: one of them")
        if getattr(getattr(self, "options", None), "clip", None) == "none":
            raise ValueError(
                "undo with clip='none', whose updates in the backward pass cannot be taken back; valid: clip='exact', "
                "clip='speculative', or undo=False"
            )
        if getattr(self, "capture", False):
            raise ValueError("undo with capture=True has not been tried on a GPU; valid: one of them")
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        for name in unknown_schedules(schedules):
            warn_once(
                f"undo multiplies the learning rates that {name} keeps by torch's names (base_lrs, eta_min, ...); if "
                "it keeps them elsewhere, its next step takes the multiplication back"
            )


class _Keeper:
    """The hooks of the callback that keeps the judge, for either root of Lightning."""

    root: ClassVar[str]

    def __init__(self, judge: UndoJudge) -> None:
        self.judge = judge

    def __reduce__(self) -> Any:  # spawned processes get the callback by pickle
        return _new_keeper, (self.root, self.judge)

    @property
    def state_key(self) -> str:
        """The name in checkpoints, the same for both roots."""
        return "lightning_optim.Undo"

    def state_dict(self) -> dict[str, Any]:
        """The judge's state."""
        return self.judge.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the judge's state."""
        self.judge.load_state_dict(state_dict)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log how many steps were undone, and what the learning rate was multiplied by in all."""
        if not trainer.barebones:
            pl_module.log("undo/count", float(self.judge.count))
            pl_module.log("undo/lr_scale", self.judge.lr_scale)


@cache
def _keeper(root: str) -> Any:
    return type("UndoKeeper", (_Keeper, import_module(root).Callback), {"__module__": __name__, "root": root})


def _new_keeper(root: str, judge: UndoJudge) -> Any:
    return _keeper(root)(judge)
