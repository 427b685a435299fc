"""How tensors travel between a device and host memory.

A transport starts copies and says when they are done; what is copied when is decided elsewhere (see
:mod:`lightning_optim.offload.pipeline`). Three exist: plain copies, for weights that are in host memory already; CUDA
streams (:mod:`lightning_optim.offload.cuda`); and a simulated link (:mod:`lightning_optim.offload.link`), which stands
for a device in tests of order and overlap.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Ticket:
    """A copy that was started. One of this very class is done already."""

    def wait(self) -> None:
        """Make the host wait until the copy is done."""

    def wait_on_device(self) -> None:
        """Make work that is launched on the device from here on wait for the copy; the host need not wait."""
        self.wait()


class Transport(ABC):
    """Starts copies between a device and host memory. Both directions may be called from any thread.

    Attributes:
        pins: Whether host memory is to be pinned.
    """

    pins: bool = False

    def fence(self) -> Any:
        """A mark after all work launched so far, which copies can be told to wait for."""
        return None

    def place(self) -> Callable[[], AbstractContextManager[Any]]:
        """Makes, for another thread, a context in which its work on the device is done where the caller's is."""
        return nullcontext

    @abstractmethod
    def fetch(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str) -> Ticket:
        """Copy from the device to the host, after all that was launched on the sources' device.

        Args:
            sources: Tensors on the device; they may be freed as soon as this returns.
            targets: Tensors on the host, of the same shapes.
            label: What it is, for records of what happened when.
        """

    @abstractmethod
    def send(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str, after: Any = None) -> Ticket:
        """Copy from the host to the device.

        Args:
            sources: Tensors on the host; they must not change before the copy is done.
            targets: Tensors on the device.
            label: What it is, for records of what happened when.
            after: A :meth:`fence` to wait for: work that was launched before it may still use the targets.
        """

    def close(self) -> None:  # noqa: B027 # most keep nothing running
        """End what the transport keeps running."""


class CopyTransport(Transport):
    """Plain copies, which are done when the call returns."""

    def fetch(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str) -> Ticket:
        """See :meth:`Transport.fetch`."""
        copy_all(sources, targets)
        return Ticket()

    def send(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str, after: Any = None) -> Ticket:
        """See :meth:`Transport.send`."""
        copy_all(sources, targets)
        return Ticket()


@torch.no_grad()
def copy_all(sources: Sequence[Tensor], targets: Sequence[Tensor], *, non_blocking: bool = False) -> None:
    """Copy each source to its target."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=non_blocking)
