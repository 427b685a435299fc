"""Detached steps: masters and state are in host memory; gradients travel there, and new weights travel back.

>>> from lightning_optim.offload import Detached, DetachedOptions
>>> DetachedOptions(bucket_mb=16).described()
"masters in float32, clip='exact', buckets of 16 MB"
"""

from lightning_optim.offload.options import DetachedOptions
from lightning_optim.offload.pipeline import Detached

__all__ = ["Detached", "DetachedOptions"]
