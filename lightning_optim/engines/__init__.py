"""Engines: who runs an update over a bucket of tensors."""

from lightning_optim.engines.base import Bucket, Decision, Engine, Layout, choose, requested_engine
from lightning_optim.engines.eager import EagerEngine
from lightning_optim.engines.foreach import ForeachEngine
from lightning_optim.engines.host import HostEngine
from lightning_optim.engines.triton import TritonEngine

ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (EagerEngine(), ForeachEngine(), HostEngine(), TritonEngine())
}

#: The order in which ``engine="auto"`` tries the engines, by device type: fastest first.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("host", "foreach", "eager"),
    "cuda": ("triton", "foreach", "eager"),
    "default": ("foreach", "eager"),
}


def available_engines() -> dict[str, str | None]:
    """For each engine, None if it can be used on this machine, else why not."""
    return {name: engine.unavailable() for name, engine in ENGINES.items()}


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
