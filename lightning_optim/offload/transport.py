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
    """A copy that was started. This one is done."""

    def wait(self) -> None:
        """Have the host wait until the copy is done."""

    def wait_on_device(self) -> None:
        """Have all that is launched on the device from here on wait until the copy is done; the host goes on."""
        self.wait()


class Transport(ABC):
    """Starts copies between a device and host memory. Both directions may be called from any thread.

    Attributes:
        pins: Whether host memory is to be pinned.
    """

    pins: bool = False

    def fence(self) -> Any:
        """What has been launched so far: copies may be told to come after it."""
        return None

    def place(self) -> Callable[[], AbstractContextManager[Any]]:
        """For a thread: where who calls this would have its work done on the device."""
        return nullcontext

    @abstractmethod
    def fetch(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str) -> Ticket:
        """Copy from the device to the host, after all that was launched on the sources' device.

        Args:
            sources: On the device; they may be freed as soon as this returns.
            targets: On the host, of the same shapes.
            label: What it is, for records of what happened when.
        """

    @abstractmethod
    def send(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str, after: Any = None) -> Ticket:
        """Copy from the host to the device.

        Args:
            sources: On the host; they must not change before the copy is done.
            targets: On the device.
            label: What it is, for records of what happened when.
            after: A :meth:`fence`: only what was launched before it may still use the targets.
        """

    def close(self) -> None:  # noqa: B027 # most keep nothing running
        """End what the transport keeps running."""


class CopyTransport(Transport):
    """Plain copies, done when the call returns."""

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
