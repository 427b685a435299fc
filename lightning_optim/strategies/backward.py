"""Steps in the backward pass under a Lightning Trainer, whose settings are checked before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch.optim import Optimizer

from lightning_optim.control.step_in_backward import CLIPS, StepInBackward
from lightning_optim.warnings import warn_once

#: Whether to step in the backward pass; a string also says how gradients are clipped.
StepsInBackward = bool | Literal["per_tensor", "previous_norm"]


def in_backward(
    optimizer: Optimizer, trainer: Any, how: StepsInBackward, is_stock: Callable[[Any, str], bool]
) -> StepInBackward:
    """Make backward passes step an optimizer's parameters.

    Args:
        optimizer: The optimizer.
        trainer: The Lightning Trainer.
        how: True, or how gradients are clipped.
        is_stock: Tells whether a module's hook of a name is Lightning's own.

    Raises:
        TypeError: The optimizer is not one of ours that steps parameter by parameter.
        ValueError: The training needs all gradients at once.
    """
    name, module = f"step_in_backward={how!r}", trainer.lightning_module
    off = "valid: step_in_backward=False"
    if not module.automatic_optimization:
        raise ValueError(f"{name} with manual optimization, where the module decides when it steps; {off}")
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"{name} with precision={trainer.precision!r}: whether a step is to be left out is known only after the "
            f"last gradient; {off}, or precision='bf16-mixed'"
        )
    if not is_stock(module, "configure_gradient_clipping"):
        raise ValueError(f"{name} with a configure_gradient_clipping of the module's own, which needs gradients; {off}")
    max_norm, clip = trainer.gradient_clip_val or None, how if how in CLIPS else None
    if max_norm is not None and trainer.gradient_clip_algorithm == "value":
        raise ValueError(f"{name} with gradient_clip_algorithm='value', which needs gradients; {off}")
    if max_norm is None and clip is not None:
        raise ValueError(f"{name} says how to clip, but gradient_clip_val is not set; valid: step_in_backward=True")
    if max_norm is not None and clip is None:
        raise ValueError(
            f"{name} with gradient_clip_val={max_norm}: the global norm is known only when all gradients are; valid: "
            f"step_in_backward={' or '.join(map(repr, CLIPS))}, which are approximations, or False"
        )
    if trainer.accumulate_grad_batches > 1:
        warn_once(
            f"{name} with accumulate_grad_batches={trainer.accumulate_grad_batches}: gradients exist together until "
            "the last batch of each window; results are the same, memory is not saved"
        )
    backward = StepInBackward(optimizer, max_norm=max_norm, clip=clip)  # type: ignore[arg-type] # it checks them
    backward.last = False
    return backward
