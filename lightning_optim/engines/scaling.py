"""Unscaling and clipping of a step's gradients, and the decision to leave the step out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

#: As in ``torch.nn.utils.clip_grad_norm_``.
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class LossScale:
    """How the loss was scaled whose gradients a step gets.

    Attributes:
        scale: What the loss was multiplied by, 0-dim float32 on the gradients' device; None: nothing.
        found_inf: 0-dim float32 on the gradients' device. Nonzero: the step is left out. With ``check``, it is set to
            1 when a gradient is infinite or NaN.
        check: Look for infinite and NaN gradients; not needed where ``found_inf`` already tells.
    """

    scale: Tensor | None
    found_inf: Tensor
    check: bool = True


def needs_squares(max_norm: float | None, loss: LossScale | None) -> bool:
    """Whether clipping, or a search for infinite gradients, needs the sum of their squares."""
    return max_norm is not None or (loss is not None and loss.check)


@dataclass(frozen=True)
class Scaling:
    """How the gradients of one step are unscaled and clipped, and whether the step is done at all.

    Engines whose ``controls_on_device`` is set evaluate this in their own kernels; for all others these methods do.

    Attributes:
        max_norm: Clip the global norm of the unscaled gradients to this; None: no clipping.
        loss: The loss scale, if there is one.
        squares: The sum of squares of all gradients as they are in memory, in float64 and in any number of parts;
            None where neither clipping nor a check needs it.
        scale: What the loss was multiplied by.
    """

    max_norm: float | None = None
    loss: LossScale | None = None
    squares: Tensor | None = None
    scale: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        """Keep the scale of this step: a scaler changes its own in place right after it."""
        scale = None if self.loss is None or self.loss.scale is None else self.loss.scale.clone()
        object.__setattr__(self, "scale", scale)

    def norm(self) -> Tensor | None:
        """The global norm of the unscaled gradients, a 0-dim float64 tensor."""
        if self.squares is None:
            return None
        norm = self.squares.sum().sqrt()
        return norm if self.scale is None else norm / self.scale.to(norm.device, torch.float64)

    def skip(self) -> bool:
        """Whether to leave the step out; waits for the device, and sets ``found_inf``."""
        if self.loss is None:
            return False
        if self.loss.check and self.squares is not None:
            # A sum of squares in float64 is finite if and only if all float32 gradients are.
            overflow = (~torch.isfinite(self.squares.sum())).to(self.loss.found_inf)
            self.loss.found_inf.copy_(torch.maximum(self.loss.found_inf, overflow))
        return bool(self.loss.found_inf.item())

    def factor(self) -> Tensor | None:
        """The factor of the gradients, 0-dim float64; None for 1; NaN if a norm to be clipped is, as in torch."""
        factor = None if self.scale is None else 1 / self.scale.double()
        norm = self.norm()
        if self.max_norm is not None and norm is not None:
            clip = (self.max_norm / (norm + _NORM_EPS)).clamp(max=1.0)
            factor = clip if factor is None else clip * factor.to(clip.device)
        return factor
