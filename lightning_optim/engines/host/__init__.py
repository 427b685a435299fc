"""The host engine: Programs printed as C, compiled by the system's compiler, called through ctypes."""

from lightning_optim.engines.host.engine import HostEngine

__all__ = ["HostEngine"]
