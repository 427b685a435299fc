"""A loss scaler with bounds, which gives up with an error that says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from lightning_optim.checks import POSITIVE_FINITE, above, check_number, check_switch, whole
from lightning_optim.control.overflow import find_overflow, parameters_of
from lightning_optim.control.skipped_steps import SkippedSteps

#: After so many skipped steps in a row, the default gives up. A scale that only is too large is halved 16 times from
#: 65536 to 1; what still overflows 34 steps later is not the scale's fault.
MOST_SKIPPED = 50

#: The numbers that settings may be.
RANGES = {
    "init_scale": POSITIVE_FINITE,
    "growth_factor": above(1),
    "backoff_factor": above(0, 1),
    "growth_interval": whole(1),
    "min_scale": POSITIVE_FINITE.or_none(),
    "max_scale": POSITIVE_FINITE.or_none(),
    "max_skipped_steps": whole(1).or_none(),
}

#: torch's scalers of one process; those of devices are the same under older names.
PLAIN = (torch.amp.GradScaler, torch.cuda.amp.GradScaler, torch.cpu.amp.GradScaler)

#: Entries of a state dict that a plain scaler's does not have.
COUNTS = ("consecutive_skips", "skipped_steps")


class TooManySkippedStepsError(FloatingPointError):
    """Too many steps in a row were skipped, since gradients were inf or NaN; the message says which one was first."""


class LossScaler(torch.amp.GradScaler):
    """A ``torch.amp.GradScaler`` with a floor and a ceiling, which counts skipped steps and gives up after too many.

    It is used as torch's own, with the same results as long as no bound is met. Bounds and counts are kept on the
    device: beyond what torch's own does, nothing waits for it, except that from the ``max_skipped_steps - 1``-th
    skipped step in a row on the host looks at the next step's flag at once.

    Skipped steps are counted for each optimizer of its own, so that one whose gradients overflow all the time is
    noticed beside another that is doing well.

    Args:
        device: The type of the device: ``"cuda"``, ``"cpu"``, ...
        init_scale: What the loss is multiplied by at first.
        growth_factor: What the scale is multiplied by after ``growth_interval`` steps without an overflow.
        backoff_factor: What the scale is multiplied by after a step whose gradients were inf or NaN.
        growth_interval: Steps in a row without an overflow after which the scale grows.
        enabled: With False, losses and gradients are left alone.
        min_scale: The scale does not fall below this; None: it may fall to zero, as torch's does. A loss whose
            gradients overflow even unscaled needs a scale below 1.
        max_scale: The scale does not grow beyond this; None: torch lets it grow to the largest float32 number.
        max_skipped_steps: Skipped steps of one optimizer in a row after which an error is raised; None: never.
        dynamic: With False the scale stays at ``init_scale``; overflows are skipped and counted all the same.
        module: Has the names of the parameters, for the error; only a weak reference is kept. Without it the
            optimizer's ``"param_names"`` are used, if it has some.

    Attributes:
        gradients_may_be_dropped: Whether a step without any gradient is one whose gradients were dropped on purpose,
            and leaves the scale as it is. If not, the backward pass was forgotten: an error, as with torch's own.
        after_step: Called with the flag of each step of :meth:`step`, nonzero if it was skipped.

    Raises:
        ValueError: An argument is not valid.
        TooManySkippedStepsError: (by :meth:`step`) Steps were skipped ``max_skipped_steps`` times in a row.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> scaler = LossScaler("cpu", init_scale=1024.0, max_scale=2048.0, growth_interval=1, module=model)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     scaler.scale(model(torch.ones(3, 2)).mean()).backward()
        ...     _ = scaler.step(optimizer)
        ...     scaler.update()
        >>> scaler.get_scale(), scaler.step_was_skipped(optimizer)
        (2048.0, False)

    References:
        Micikevicius et al., Mixed Precision Training, arXiv:1710.03740.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        min_scale: float | None = 1.0,
        max_scale: float | None = None,
        max_skipped_steps: int | None = MOST_SKIPPED,
        dynamic: bool = True,
        module: nn.Module | None = None,
    ) -> None:
        settings = {
            "init_scale": init_scale,
            "growth_factor": growth_factor,
            "backoff_factor": backoff_factor,
            "growth_interval": growth_interval,
            "min_scale": min_scale,
            "max_scale": max_scale,
            "max_skipped_steps": max_skipped_steps,
        }
        check_settings(type(self).__name__, {**settings, "dynamic": dynamic})
        super().__init__(
            device,
            init_scale=init_scale,
            growth_factor=growth_factor,
            backoff_factor=backoff_factor,
            growth_interval=growth_interval,
            enabled=enabled,
        )
        self.min_scale, self.max_scale = min_scale, max_scale
        self.max_skipped_steps, self.dynamic = max_skipped_steps, dynamic
        self.gradients_may_be_dropped = False
        self.after_step: Callable[[Tensor], None] | None = None
        self._skips: list[SkippedSteps] = []
        self._numbers: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._module: ReferenceType[nn.Module] | None = None
        self.module = module

    @property
    def module(self) -> nn.Module | None:
        """The module that has the names of the parameters."""
        return None if self._module is None else self._module()

    @module.setter
    def module(self, module: nn.Module | None) -> None:
        self._module = None if module is None else ref(module)

    def number(self, optimizers: Sequence[Optimizer]) -> None:
        """Say in which order optimizers are counted in ``state_dict``; without it, it is that of their first steps."""
        self._numbers = WeakKeyDictionary({optimizer: number for number, optimizer in enumerate(optimizers)})

    # -- what torch's own scaler has ----------------------------------------------------------------------------

    def scale(self, outputs: Any) -> Any:
        """See ``torch.amp.GradScaler.scale``."""
        for skips in self._skips:
            if skips.watch is not None and isinstance(outputs, Tensor):
                skips.watch.note_loss(outputs)
        return super().scale(outputs)

    def unscale_(self, optimizer: Optimizer) -> None:
        """See ``torch.amp.GradScaler.unscale_``."""
        if self._enabled and self._scale is None and self.gradients_may_be_dropped:  # no loss has been scaled yet
            return
        super().unscale_(optimizer)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step the optimizer unless a gradient is inf or NaN.

        Raises:
            TooManySkippedStepsError: Such steps came too often in a row. The weights are those before them.
        """
        if not self._enabled:
            return super().step(optimizer, *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        ready = state["stage"] is not OptState.STEPPED and not state["found_inf_per_device"]
        if ready and self.gradients_may_be_dropped and has_no_gradients(optimizer):
            state["stage"] = OptState.STEPPED
            return optimizer.step(*args, **kwargs)
        result = super().step(optimizer, *args, **kwargs)
        if not state["found_inf_per_device"]:  # an optimizer that unscales by itself had no gradients
            return result
        flag = state.pop("read", None)
        found_inf = combined_flag(state) if flag is None else flag
        if self.after_step is not None:
            self.after_step(found_inf)
        self.count(optimizer, found_inf)
        return result

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Update the scale, and keep it within its bounds: one that is given here, too."""
        if not self._enabled:
            return
        seen = any(state["found_inf_per_device"] for state in self._per_optimizer_states.values())
        if new_scale is None and not seen and self.gradients_may_be_dropped:
            self._per_optimizer_states.clear()
            return
        if new_scale is None and not self.dynamic:
            self._check_scale_growth_tracker("update")
            self._per_optimizer_states.clear()
        else:
            super().update(new_scale)
        if self._scale is not None and (self.min_scale is not None or self.max_scale is not None):
            self._scale.clamp_(self.min_scale, self.max_scale)

    def state_dict(self) -> dict[str, Any]:
        """What torch's own scaler saves, and the counts of skipped steps of each optimizer."""
        if not self._enabled:
            return {}
        counts = [skips.read() for skips in self._skips]
        return {**super().state_dict(), **{key: [count[at] for count in counts] for at, key in enumerate(COUNTS)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the scale and the counts, from this class's state or from that of torch's own scaler.

        Settings are not loaded: they are those that were given to this scaler, and so is the scale of one that is not
        dynamic.
        """
        if not self._enabled or not state_dict:
            super().load_state_dict(state_dict)
            return
        scale = self._bounded(float(state_dict["scale"])) if self.dynamic else self._init_scale
        # torch's scaler grows when the count is equal to the interval: beyond a shorter one, it would never grow again.
        tracker = min(int(state_dict["_growth_tracker"]), self._growth_interval - 1)
        super().load_state_dict(super().state_dict() | {"scale": scale, "_growth_tracker": tracker})
        self._stop_watching()
        consecutive, total = (state_dict.get(key, []) for key in COUNTS)
        self._skips = [SkippedSteps(*counts) for counts in zip(consecutive, total, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies, which belong to no training."""
        counts = [SkippedSteps(*skips.read()) for skips in self._skips]
        running = {"_skips": counts, "_numbers": None, "_module": None, "after_step": None}
        return super().__getstate__() | running

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy."""
        super().__setstate__(state)
        self._numbers = WeakKeyDictionary()

    def _maybe_opt_step(self, optimizer: Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Keep the flag, which the host reads here as it does in torch's own scaler."""
        skipped = any(flag.item() for flag in optimizer_state["found_inf_per_device"].values())
        optimizer_state["read"] = torch.tensor(float(skipped), dtype=torch.float32, device="cpu")
        return None if skipped else optimizer.step(*args, **kwargs)

    # -- skipped steps ------------------------------------------------------------------------------------------

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps were skipped, of all optimizers: a tensor, so that nobody waits who does not read it."""
        device = "cpu" if not self._skips else self._skips[0].counts.device
        total = torch.zeros((), dtype=torch.int64, device=device)
        for skips in self._skips:
            total += skips.counts[1].to(device, non_blocking=True)
        return total

    def step_was_skipped(self, optimizer: Optimizer) -> bool:
        """Whether the last step of an optimizer was skipped; this waits for the device."""
        number = self._numbers.get(optimizer)
        return number is not None and number < len(self._skips) and self._skips[number].read()[0] > 0

    def count(self, optimizer: Optimizer, found_inf: Tensor) -> None:
        """Count a step, before its gradients are gone; :meth:`step` does.

        Args:
            optimizer: The optimizer.
            found_inf: One number, nonzero if the step was skipped.

        Raises:
            TooManySkippedStepsError: It was one too many.
        """
        if optimizer not in self._numbers:
            self._numbers[optimizer] = max(self._numbers.values(), default=-1) + 1
        number = self._numbers[optimizer]
        while len(self._skips) <= number:
            self._skips.append(SkippedSteps())
        skips, most = self._skips[number], self.max_skipped_steps
        skips.add(found_inf)
        if most is None:
            return
        if skips.known() >= most - 1 and skips.read()[0] >= most:
            try:
                raise TooManySkippedStepsError(self._complaint(optimizer, skips))
            finally:
                skips.restart()
                self._per_optimizer_states.clear()
        # On CUDA the count is known one step late, and the last step of a row has to be watched.
        skips.watch_if(skips.consecutive >= max(1, most - 2), optimizer)

    def give_back(self, scaler: torch.amp.GradScaler) -> None:
        """End a training: hand the scale over to the scaler in whose place this one was, and forget the rest."""
        self._stop_watching()
        self.after_step = self.module = None
        self._per_optimizer_states.clear()
        if self._scale is None or self._growth_tracker is None:
            return
        if scaler._scale is None:
            scaler._lazy_init_scale_growth_tracker(self._scale.device)
        scaler._check_scale_growth_tracker("give_back")[0].copy_(self._scale)
        tracker = self._growth_tracker.clamp(max=scaler._growth_interval - 1)
        scaler._check_scale_growth_tracker("give_back")[1].copy_(tracker)

    def _bounded(self, scale: float) -> float:
        lowest = scale if self.min_scale is None else max(scale, self.min_scale)
        return lowest if self.max_scale is None else min(lowest, self.max_scale)

    def _stop_watching(self) -> None:
        for skips in self._skips:
            skips.watch_if(False, None)

    def _complaint(self, optimizer: Optimizer, skips: SkippedSteps) -> str:
        """The message for too many skipped steps."""
        scale = self.get_scale()
        overflow = find_overflow(optimizer, self.module, skips.watch)
        if overflow.is_beyond_scaling:
            advice = (
                "no scale can mend that: look at the data, the loss and the learning rate, and go back to a checkpoint"
            )
        elif not self.dynamic:
            advice = f"valid: dynamic=True, an init_scale below {scale:g}, or bfloat16 (precision='bf16-mixed')"
        elif self.min_scale is not None and scale <= self.min_scale:
            advice = "valid: a smaller loss, min_scale=None, or bfloat16 (precision='bf16-mixed')"
        else:
            advice = "valid: a larger max_skipped_steps, a smaller init_scale, or bfloat16 (precision='bf16-mixed')"
        return (
            f"{type(self).__name__}: {self.max_skipped_steps} steps in a row were skipped, since gradients were inf or "
            f"NaN, the last one with a scale of {scale:g}. {overflow} What to do: {advice}"
        )


def check_settings(who: str, settings: dict[str, Any]) -> None:
    """Check the settings of a loss scaler, by name.

    Args:
        who: Whose settings they are, for the error.
        settings: The arguments of :class:`LossScaler`.

    Raises:
        ValueError, WrongTypeError: One is not valid, or the bounds are not in order.
    """
    for name, valid in RANGES.items():
        check_number(who, name, settings[name], valid)
    check_switch(who, "dynamic", settings["dynamic"])
    scale, least, most = settings["init_scale"], settings["min_scale"], settings["max_scale"]
    if (least is not None and least > scale) or (most is not None and most < scale):
        raise ValueError(
            f"{who}: init_scale={scale!r} with min_scale={least!r} and max_scale={most!r}; "
            "valid: min_scale <= init_scale <= max_scale"
        )


def has_no_gradients(optimizer: Optimizer) -> bool:
    """Whether no parameter has a gradient."""
    return all(p.grad is None for p in parameters_of(optimizer))


def combined_flag(optimizer_state: dict[str, Any]) -> Tensor:
    """The flag of a step, from those of all devices; nothing is read."""
    first, *others = optimizer_state["found_inf_per_device"].values()
    return sum((flag.to(first.device, non_blocking=True) for flag in others), start=first)


def loss_scaler_like(scaler: Any) -> type[LossScaler] | None:
    """The class of ours that can take the place of a scaler; None: it is of a class that is not torch's own."""
    if type(scaler) in PLAIN:
        return LossScaler
    return _sharded() if type(scaler).__name__ == "ShardedGradScaler" and type(scaler) in _sharded().__mro__ else None


@cache
def _sharded() -> type[LossScaler]:
    """:class:`LossScaler` for FSDP 1, whose processes have to tell each other of overflows."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return type("ShardedLossScaler", (LossScaler, ShardedGradScaler), {"__doc__": LossScaler.__doc__})
