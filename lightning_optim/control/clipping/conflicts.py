"""What in a Lightning training does not go with a callback that clips gradients, and what to do about it."""

from __future__ import annotations

from typing import Any, Protocol

from torch.optim import LBFGS, Optimizer

from lightning_optim.optimizers.sam import stepped
from lightning_optim.stepping.evaluations import request_of


class Clipping(Protocol):
    """What is asked about the callback."""

    max_norm: float | None
    error_if_nonfinite: bool

    @property
    def clips_in_step(self) -> bool:
        """Whether our strategies clip inside of their steps."""


def settings_conflict(trainer: Any, module: Any, clipping: Clipping) -> str | None:
    """A setting of the Trainer, the module or the strategy that does not go with clipping, with what would.

    Args:
        trainer: A Lightning Trainer.
        module: Its module.
        clipping: The callback.
    """
    strategy, once = trainer.strategy, "gradients would be clipped twice; valid: one of them"
    bases = [cls.__name__ for cls in type(strategy).__mro__]
    if limit := trainer.gradient_clip_val:
        return f"Trainer(gradient_clip_val={limit!r}): {once}"
    hook = getattr(module.configure_gradient_clipping, "__module__", "")
    if module.automatic_optimization and not hook.startswith(("lightning.", "pytorch_lightning.")):
        return f"a configure_gradient_clipping of the module's own: {once}"
    if how := getattr(strategy, "step_in_backward", False):
        return (
            f"step_in_backward={how!r}, which steps weights before all gradients are there; valid: "
            "step_in_backward=False, or step_in_backward='per_tensor' and Trainer(gradient_clip_val=...) in place of it"
        )
    if clipping.clips_in_step and getattr(getattr(strategy, "options", None), "clip", None) == "none":
        return (
            "the strategy's clip='none', which steps weights before the norm is known; valid: clip='exact' or "
            "clip='speculative'"
        )
    if any("deepspeed" in name.lower() for name in bases):
        return (
            f"{bases[0]}: DeepSpeed keeps the gradients to itself; valid: Trainer(gradient_clip_val=...), by which it "
            "clips them"
        )
    if _is_fsdp1(strategy) and clipping.max_norm is None:
        return (
            f"{bases[0]} (FSDP1), in whose flat parameters neither units nor tensors are known; valid: max_norm=..., "
            "or FSDP2 (ModelParallelStrategy)"
        )
    if _is_fsdp1(strategy) and clipping.error_if_nonfinite and _scales(trainer):
        return (
            f"error_if_nonfinite=True under {bases[0]} (FSDP1) with a loss scaler, whose skipped steps would raise the "
            "error; valid: error_if_nonfinite=False, precision='bf16-mixed', or FSDP2 (ModelParallelStrategy)"
        )
    return None


def optimizer_conflict(trainer: Any, optimizer: Optimizer, clipping: Clipping) -> str | None:
    """Why an optimizer does not go with clipping, with what would.

    Args:
        trainer: A Lightning Trainer.
        optimizer: One of its optimizers.
        clipping: The callback.
    """
    name, request = type(optimizer).__name__.removesuffix("Optim"), request_of(optimizer)
    inner = stepped(optimizer)
    if own := getattr(getattr(inner, "options", None), "max_grad_norm", None):
        inside = type(inner).__name__.removesuffix("Optim")
        return f"{inside}(max_grad_norm={own!r}): gradients would be clipped twice; valid: one of them"
    if request == "loss_and_gradient" or isinstance(optimizer, LBFGS):
        return (
            f"{name}: along a clipped gradient its line search compares what is not of the same function; valid: no "
            f"clipping, or another optimizer than {name}"
        )
    replays = getattr(trainer.strategy, "replays_windows", False) and trainer.lightning_module.automatic_optimization
    if request == "gradient" and not replays and clipping.max_norm is None:
        return (
            f"{name} under {type(trainer.strategy).__name__}, where the gradient of its ascent would be clipped too; "
            "valid: max_norm=..., which leaves its direction as it is, or a strategy of ours, such as 'in_graph', in "
            "automatic optimization"
        )
    if fsdp1(trainer) is not None and len(trainer.optimizers) > 1:
        return f"FSDP1 and {len(trainer.optimizers)} optimizers, as its norm is that of all parameters; valid: one"
    if fsdp1(trainer) is not None and _scales(trainer) and getattr(optimizer, "_step_supports_amp_scaling", False):
        return (
            f"{name}(fused=True) under FSDP1 with a loss scaler, which leaves the gradients scaled for its step; "
            "valid: fused=False, precision='bf16-mixed', or FSDP2 (ModelParallelStrategy)"
        )
    if _is_fsdp1(trainer.strategy) and fsdp1(trainer) is None:
        return (
            f"{type(trainer.strategy).__name__} (FSDP1) and a module that wraps parts of itself: only a whole that "
            "is wrapped knows its global norm; valid: wrapping by the strategy (auto_wrap_policy=...), or FSDP2 "
            "(ModelParallelStrategy)"
        )
    return None


def fsdp1(trainer: Any) -> Any:
    """The model of a Lightning Trainer, if FSDP1 has wrapped it; only its own method knows its global norm."""
    model = trainer.strategy.model
    return model if hasattr(type(model), "clip_grad_norm_") else None


def _scales(trainer: Any) -> bool:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and bool(scaler.is_enabled())


def _is_fsdp1(strategy: Any) -> bool:
    return any(cls.__name__ == "FSDPStrategy" for cls in type(strategy).__mro__)
