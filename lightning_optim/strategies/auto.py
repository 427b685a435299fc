"""``optim_auto``: the placement that the golden rule gives, and detached if the device runs out of memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.checks import NONNEGATIVE, check_number
from lightning_optim.control.replay.window import ModuleState, RandomStates, muted
from lightning_optim.control.rollback.policy import UndoPolicy
from lightning_optim.offload import DetachedOptions
from lightning_optim.offload.options import Clip
from lightning_optim.offload.placing import Placement
from lightning_optim.optimizers.sam import stepped
from lightning_optim.placement.choice import Plan, choose, fall_back
from lightning_optim.placement.footprint import footprint
from lightning_optim.placement.machine import Machine
from lightning_optim.placement.needs import Conditions
from lightning_optim.strategies.detached import DetachedBase
from lightning_optim.strategies.detached_drive import DetachedDrive
from lightning_optim.strategies.drive import REPLACED, Drive, why_own_step
from lightning_optim.strategies.driven import OnOneDevice
from lightning_optim.warnings import warn_once


class Auto(OnOneDevice, DetachedBase):
    """Chooses between in graph and detached when a fit starts, and once more if the device runs out of memory.

    Args:
        device: See Lightning's strategy.
        accelerator: See Lightning's strategy.
        checkpoint_io: See Lightning's strategy.
        precision_plugin: See Lightning's strategy.
        activation_gb: Gigabytes (1e9 bytes) of device memory that activations need; None: a reserve is kept.
        master_dtype: See the detached strategy.
        clip: See the detached strategy, or ``"auto"``.
        bucket_mb: See the detached strategy.
        engine: See both strategies.
        undo: See both strategies.

    Raises:
        ValueError: An option is not valid.
    """

    gradients_are_local = True

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        activation_gb: float | None = None,
        master_dtype: str = "float32",
        clip: Clip | Literal["auto"] = "auto",
        bucket_mb: float = 32.0,
        engine: str = "auto",
        undo: bool | dict[str, Any] | UndoPolicy = False,
    ) -> None:
        options = DetachedOptions(master_dtype, "exact" if clip == "auto" else clip, bucket_mb, engine=engine)
        check_number(
            "", "activation_gb", activation_gb, NONNEGATIVE.or_none().described("None, or gigabytes, 0 or more")
        )
        super().__init__(
            device,
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            options=options,
            undo=undo,
        )
        self.activation_gb = activation_gb
        self.plan: Plan | None = None
        self._given, self._chooses_clip = options, clip == "auto"

    # -- what Lightning calls -----------------------------------------------------------------------------------

    def setup(self, trainer: Any) -> None:
        """Set up as Lightning's own strategy does, after which memory is measured and the placement chosen."""
        self.plan, self.options = None, self._given
        super().setup(trainer)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch; if there is no memory for it, move masters and state to the host, and try again."""
        evaluate = partial(super().training_step, *args, **kwargs)
        again = self._before_an_evaluation()
        if again is None:
            return evaluate()
        try:
            return evaluate()
        except torch.OutOfMemoryError as error:
            failed = error.with_traceback(None)  # its frames would keep activations alive
        self._fall_back(failed)
        again()
        return evaluate()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Differentiate; if there is no memory for it, move masters and state to the host, and do the window again."""
        try:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            window = self._window
            if not self._may_fall_back() or not window:
                raise
            failed = error.with_traceback(None)
        if not closure_loss._is_view():
            closure_loss.detach_()  # the caller holds it, and its graph has the activations of the pass that failed
        self._fall_back(failed)
        for one in self.optimizers:
            self._forget_gradients(stepped(one))
        assert optimizer is not None  # noqa: S101 # automatic optimization gives one
        with muted(self.lightning_module, "log", "log_dict"):
            window.replay(partial(self._backward_again, optimizer=optimizer), nullcontext)
        closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)  # calls hooks
        self.post_backward(closure_loss)
        return closure_loss

    # -- ours ---------------------------------------------------------------------------------------------------

    def report(self) -> str:
        """The plan, and which engine steps which optimizer."""
        report = super().report()
        # After a training, the report is the one that was kept, and contains the plan.
        told = self.plan is None or self._drives is None
        return report if told else f"{self.strategy_name}: {self.plan}\n{report}"

    def _take_over(self, optimizer: Optimizer, trainer: Any) -> None:
        self.plan = self._choose(optimizer, trainer)
        if self.plan.placement == "detached":
            if self._chooses_clip:
                # The plan's "none" becomes "exact": with it, a backward pass that is not always the same stops the run.
                clip: Clip = "exact" if self.plan.clip == "none" else self.plan.clip
                self.options = replace(self.options, clip=clip)
            super()._take_over(optimizer, trainer)
        else:
            if not self._chooses_clip:  # refuse now what would fail after a fall-back
                self._check_clip(trainer)
                Placement(optimizer, self.options, None, None)
            self._drive(optimizer)

    def _choose(self, optimizer: Optimizer, trainer: Any) -> Plan:
        module = trainer.lightning_module
        conditions = Conditions(
            clips=self._max_norm is not None or getattr(trainer.precision_plugin, "scaler", None) is not None,
            accumulates=trainer.accumulate_grad_batches > 1,
            activation_bytes=None if self.activation_gb is None else int(self.activation_gb * 1e9),
            resident_bytes=sum(t.nbytes for t in (*module.parameters(), *module.buffers())),
            bucket_bytes=int(self.options.bucket_mb * 1e6),
        )
        needed = footprint(module, optimizer, master_dtype=self.options.dtype)
        return choose(needed, Machine.measure(self.root_device), conditions)

    def _new_drive(self, optimizer: Optimizer) -> Drive:
        if self.plan is None or self.plan.placement == "detached":
            return super()._new_drive(optimizer)
        if why_own_step(optimizer) == REPLACED:
            return Drive(optimizer, self.engine)  # whoever replaced the step knows where it may run
        drive = DetachedDrive(optimizer, self.engine, self._expectation)
        drive.rescue = self._fall_back
        return drive

    def _may_fall_back(self) -> bool:
        return (
            self.plan is not None and self.plan.placement == "in_graph" and self.lightning_module.automatic_optimization
        )

    def _is_recording(self) -> bool:
        return self._may_fall_back() or super()._is_recording()

    def _before_an_evaluation(self) -> Callable[[], None] | None:
        """A function that puts back what an evaluation changes; None if the evaluation would not be repeated."""
        if not self._may_fall_back() or self._is_replaying:
            return None
        module = self.lightning_module
        noise, state = RandomStates({self.root_device}), ModuleState(module, metrics=True)
        results = self._trainer._results  # the metrics that `log` adds up, by name
        logged = {name: ModuleState(metric, metrics=True) for name, metric in results.items()}

        def again() -> None:
            noise.put_back()
            state.put_back()
            for name in [name for name in results if name not in logged]:
                del results[name]
            for metric in logged.values():
                metric.put_back()

        return again

    def _fall_back(self, error: torch.OutOfMemoryError) -> None:
        """Move masters and state to the host.

        Raises:
            PlacementError: The host has no room for them.
        """
        assert self.plan is not None  # noqa: S101 # `_may_fall_back` has checked
        self.plan = fall_back(self.plan, error)
        _free(self.root_device)
        for optimizer in map(stepped, self.optimizers):
            drive = self._drive(optimizer)
            if isinstance(drive, DetachedDrive) and drive.detached is None:
                drive.attach(optimizer, self._detached(optimizer))
        if not super()._is_recording():
            self._window = None  # nothing is going to be repeated any more: batches need not be kept
        _free(self.root_device)
        warn_once(f"{self.strategy_name}: {self.plan.reason}", key=f"{self.strategy_name} falls back")


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
