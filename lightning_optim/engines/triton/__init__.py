"""The Triton engine: kernels printed from a Program."""

from lightning_optim.engines.triton.engine import TritonEngine

__all__ = ["TritonEngine"]
