"""Engines, which run an update over a bucket of tensors."""

from lightning_optim.engines.base import Bucket, Decision, Engine, Layout
from lightning_optim.engines.choice import ENGINES, PREFERENCE, available_engines, choose, requested_engine

__all__ = [
    "ENGINES",
    "PREFERENCE",
    "Bucket",
    "Decision",
    "Engine",
    "Layout",
    "available_engines",
    "choose",
    "requested_engine",
]
