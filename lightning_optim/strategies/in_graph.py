"""The logic of the in-graph strategies, for either root of Lightning."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from lightning_optim.control.rollback.policy import UndoPolicy
from lightning_optim.control.step_in_backward import CLIPS
from lightning_optim.engines.choice import ENGINES
from lightning_optim.optimizers.sam import stepped
from lightning_optim.strategies.backward import StepsInBackward, in_backward
from lightning_optim.strategies.drive import Drive
from lightning_optim.strategies.driven import Driven, OnOneDevice, Sharded
from lightning_optim.strategies.replicated import Replicated
from lightning_optim.warnings import warn_once


class InGraph(Driven):
    """Steps optimizers on the weights' device.

    Args:
        *args: Arguments of the Lightning strategy.
        engine: The engine of torch's optimizers and, if it is not ``"auto"``, of ours as well.
        capture: Record the steps as CUDA graphs: see :meth:`RuleOptimizer.capture_steps`.
        **kwargs: Arguments of the Lightning strategy.

    Raises:
        ValueError: The engine is unknown.
    """

    def __init__(self, *args: Any, engine: str = "auto", capture: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, engine=engine, **kwargs)
        self.capture = capture
        self.step_in_backward: StepsInBackward = False

    def _new_drive(self, optimizer: Optimizer) -> Drive:
        return Drive(optimizer, self.engine, capture=self.capture)

    def _take_over(self, optimizer: Optimizer, trainer: Any) -> None:
        drive = self._drive(optimizer)
        if self.step_in_backward:
            drive.backward = in_backward(optimizer, trainer, self.step_in_backward, self._is_stock)

    def on_train_start(self) -> None:
        """Say which engine steps which optimizer."""
        super().on_train_start()
        if self.is_global_zero:
            self._warn_without_triton()

    def _warn_without_triton(self) -> None:
        """Warn outside of CUDA, where nothing else says that these strategies are made for the Triton engine."""
        chosen = {
            decision.engine
            for optimizer in map(stepped, self.optimizers)
            if (drive := self._drive(optimizer)).own_step is None and drive.requested(optimizer) == "auto"
            for decision in drive.stepper(optimizer).report(scaled=self._scales_gradients())
        }
        if chosen and self.root_device.type != "cuda":
            reason = ENGINES["triton"].unavailable() or f"the weights are on {self.root_device}"
            warn_once(
                f"{self.strategy_name}: the triton engine cannot be used ({reason}); stepping with "
                f"{' and '.join(sorted(chosen))} instead, with the same results",
                key=f"in_graph without triton: {reason}",
            )


class InGraphOnOneDevice(OnOneDevice, InGraph):
    """:class:`InGraph` on the one device that the Trainer is given."""

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        engine: str = "auto",
        capture: bool = False,
        step_in_backward: StepsInBackward = False,
        undo: bool | dict[str, Any] | UndoPolicy = False,
    ) -> None:
        if step_in_backward not in (False, True, *CLIPS):
            raise ValueError(f"step_in_backward={step_in_backward!r}; valid: False, True, {', '.join(CLIPS)}")
        if capture and step_in_backward:
            raise ValueError(
                f"capture=True with step_in_backward={step_in_backward!r}: there is no one step to record; valid: one "
                "of them"
            )
        super().__init__(
            device,
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            engine=engine,
            capture=capture,
            undo=undo,
        )
        self.step_in_backward = step_in_backward


class InGraphReplicas(Replicated, InGraph):
    """:class:`InGraph` over DDP."""


class InGraphSharded(Sharded, InGraph):
    """:class:`InGraph` over sharded parameters."""
