"""A GradScaler whose unscaling and search for infinite gradients are done inside of the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from lightning_optim.control.loss_scale import PLAIN, LossScaler, combined_flag, has_no_gradients
from lightning_optim.engines.scaling import LossScale
from lightning_optim.optimizers.sam import stepped
from lightning_optim.strategies.drive import Drive


class InStepScaler(torch.amp.GradScaler):
    """Another view of a user's scaler, whose scale, counters and settings it shares.

    Args:
        scaler: The scaler.
        drive_of: Returns the drive of an optimizer.
        gradients_are_seen: Tells whether someone looks at the gradients between ``unscale_`` and the step, so that they
            have to be unscaled in place.
        may_be_dropped: Tells whether a step without any gradient is one whose gradients were dropped (in automatic
            optimization). Then the scale stays as it is; if not, the backward pass was forgotten, which is an error.

    Attributes:
        found_inf: The flag of the last step, which is nonzero if the step was left out.
    """

    # These attributes are not in `__dict__`, which is the user's scaler's.
    __slots__ = ("drive_of", "found_inf", "gradients_are_seen", "may_be_dropped", "scaler")

    def __init__(
        self,
        scaler: torch.amp.GradScaler,
        drive_of: Callable[[Optimizer], Drive],
        gradients_are_seen: Callable[[], bool],
        may_be_dropped: Callable[[], bool],
    ) -> None:
        self.__dict__ = scaler.__dict__
        self.scaler = scaler
        self.drive_of = drive_of
        self.gradients_are_seen = gradients_are_seen
        self.may_be_dropped = may_be_dropped
        self.found_inf: Tensor | None = None

    def __reduce__(self) -> Any:
        """Copy the user's scaler instead: a copy belongs to no training."""
        return _itself, (self.scaler,)

    def __getattr__(self, name: str) -> Any:
        """What the user's scaler has beyond torch's, such as counts of skipped steps."""
        if name in InStepScaler.__slots__:  # not set yet
            raise AttributeError(name)
        return getattr(self.scaler, name)

    @staticmethod
    def accepts(scaler: object) -> bool:
        """Whether a scaler is one of torch's plain ones, or ours: not another subclass, whose methods may do more."""
        return type(scaler) in (*PLAIN, LossScaler)

    def scale(self, outputs: Any) -> Any:
        """Scale as the user's scaler does."""
        return self.scaler.scale(outputs)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Leave the unscaling to the step, if nobody looks at the gradients before."""
        waits = self.drive_of(optimizer).postpones(stepped(optimizer)) and not self.gradients_are_seen()
        if self._enabled and waits and self._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
            return
        if self._scale is None and self.may_be_dropped():  # no loss has been scaled yet
            return
        super().unscale_(optimizer)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step, and tell the step how to unscale the gradients, and how to see that it is to be left out.

        Unlike torch's own ``step``, this reads nothing back from the device, and so does not wait for it.
        """
        self.found_inf = None
        result = self._step(optimizer, *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)] if self._enabled else {}
        if state.get("found_inf_per_device"):
            if self.found_inf is None:
                self.found_inf = combined_flag(state)
            if isinstance(self.scaler, LossScaler):
                self.scaler.count(optimizer, self.found_inf)
        return result

    def _step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        drive = self.drive_of(optimizer)
        state = self._per_optimizer_states[id(optimizer)] if self._enabled else {}
        if not self._enabled or state["stage"] is OptState.STEPPED:
            return super().step(optimizer, *args, **kwargs)
        flags = state["found_inf_per_device"].values()
        if not drive.postpones(stepped(optimizer)):
            if flags or not has_no_gradients(optimizer) or not self.may_be_dropped():
                return super().step(optimizer, *args, **kwargs)
            state["stage"] = OptState.STEPPED
            return optimizer.step(*args, **kwargs)
        if self._scale is not None or not self.may_be_dropped():
            scale, _ = self._check_scale_growth_tracker("step")
            self.found_inf = drive.cleared_flag(scale)
            if state["stage"] is OptState.READY:
                drive.loss = LossScale(scale, self.found_inf, check=True)
            else:
                for flag in flags:
                    self.found_inf += flag.to(scale.device, non_blocking=True)
                drive.loss = LossScale(None, self.found_inf, check=False)
        result = optimizer.step(*args, **kwargs)
        if flags or drive.stepper(stepped(optimizer)).scaling is not None:
            assert self.found_inf is not None  # noqa: S101 # there were gradients, so there is a scale
            state["found_inf_per_device"] = {self.found_inf.device: self.found_inf}
        elif not self.may_be_dropped():
            raise AssertionError("No inf checks were recorded for this optimizer.")
        state["stage"] = OptState.STEPPED
        return result

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Update the scale, but leave it as it is if there was no gradient."""
        seen = any(state["found_inf_per_device"] for state in self._per_optimizer_states.values())
        if new_scale is None and self._enabled and not seen and self.may_be_dropped():
            self._per_optimizer_states.clear()
        else:
            self.scaler.update(new_scale)

    def state_dict(self) -> dict[str, Any]:
        """The user's scaler's state."""
        return self.scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the user's scaler's state."""
        self.scaler.load_state_dict(state_dict)

    def _maybe_opt_step(self, optimizer: Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Note the flags; torch's own step calls this, and has the host read them."""
        flags = sum(flag.item() for flag in optimizer_state["found_inf_per_device"].values())
        self.found_inf = torch.tensor(float(flags), dtype=torch.float32, device="cpu")
        return optimizer.step(*args, **kwargs) if not flags else None


def _itself(scaler: torch.amp.GradScaler) -> torch.amp.GradScaler:
    return scaler
