"""Clipping gradients: by their global norm, by value, by unit (AGC), or adaptively by tensor (AdaGC)."""

from __future__ import annotations

from lightning_optim.control.clipping.clipper import Clipped, GradientClipper, NonfiniteGradientError
from lightning_optim.control.clipping.ways import AGC, AdaGC

__all__ = ["AGC", "AdaGC", "Clipped", "GradientClipper", "NonfiniteGradientError"]
