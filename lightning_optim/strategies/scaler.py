"""A GradScaler whose unscaling and search for infinite gradients are done inside of the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from lightning_optim.engines.scaling import LossScale
from lightning_optim.optimizers.sam import stepped
from lightning_optim.strategies.drive import Drive


class InStepScaler(torch.amp.GradScaler):
    """Another view of a user's scaler, whose scale, counters and settings it shares.

    Args:
        scaler: The scaler.
        drive_of: Finds what steps an optimizer.
        gradients_are_seen: Whether someone looks at the gradients between ``unscale_`` and the step, so that they have
            to be unscaled where they are.

    Attributes:
        found_inf: Of the last step: nonzero if it was left out.
    """

    # What is kept here is not in `__dict__`, which is the scaler's own.
    __slots__ = ("drive_of", "found_inf", "gradients_are_seen", "scaler")

    def __init__(
        self,
        scaler: torch.amp.GradScaler,
        drive_of: Callable[[Optimizer], Drive],
        gradients_are_seen: Callable[[], bool],
    ) -> None:
        self.__dict__ = scaler.__dict__
        self.scaler = scaler
        self.drive_of = drive_of
        self.gradients_are_seen = gradients_are_seen
        self.found_inf: Tensor | None = None

    @staticmethod
    def accepts(scaler: object) -> bool:
        """Whether a scaler is one of torch's plain ones: not a subclass, whose methods may do more."""
        return type(scaler) in (torch.amp.GradScaler, torch.cuda.amp.GradScaler, torch.cpu.amp.GradScaler)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Leave it to the step, where nobody looks at the gradients before."""
        waits = self.drive_of(optimizer).postpones(stepped(optimizer)) and not self.gradients_are_seen()
        if self._enabled and waits and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
            return
        super().unscale_(optimizer)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step with what the step itself needs to unscale, or to know that it is to be left out.

        Nothing is read back from the device, unlike torch's own, which waits for it.
        """
        drive = self.drive_of(optimizer)
        state = self._per_optimizer_states[id(optimizer)] if self._enabled else {}
        if not self._enabled or not drive.postpones(stepped(optimizer)) or state["stage"] is OptState.STEPPED:
            return super().step(optimizer, *args, **kwargs)
        scale, _ = self._check_scale_growth_tracker("step")
        if state["stage"] is OptState.READY:
            drive.loss = LossScale(scale, drive.cleared_flag(scale), check=True)
        else:
            found = [flag.to(scale.device, non_blocking=True) for flag in state["found_inf_per_device"].values()]
            if not found:
                raise AssertionError("No inf checks were recorded for this optimizer.")
            drive.loss = LossScale(None, drive.cleared_flag(scale).copy_(torch.stack(found).sum()), check=False)
        self.found_inf = drive.loss.found_inf
        result = optimizer.step(*args, **kwargs)
        if drive.stepper(stepped(optimizer)).scaling is None:  # as torch's own, where no parameter has a gradient
            raise AssertionError("No inf checks were recorded for this optimizer.")
        state["found_inf_per_device"] = {self.found_inf.device: self.found_inf}
        state["stage"] = OptState.STEPPED
        return result

    def _maybe_opt_step(self, optimizer: Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Of torch's own step, which has the host read the flags: note what it reads."""
        flags = sum(flag.item() for flag in optimizer_state["found_inf_per_device"].values())
        self.found_inf = torch.tensor(float(flags), dtype=torch.float32, device="cpu")
        return optimizer.step(*args, **kwargs) if not flags else None
