"""Copies on CUDA side streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.memory import is_lazy, same_order
from lightning_optim.offload.transport import Ticket, Transport, copy_all


class _Launched(Ticket):
    """A copy on a stream."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def wait(self) -> None:
        # The event does not spin: the processor has updates to compute meanwhile.
        self._event.synchronize()

    def wait_on_device(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class CudaTransport(Transport):
    """Copies on one stream for each direction, so that both run at once, beside the kernels of the model.

    Every copy waits for an event of the stream that produced what it reads: if it waited for another stream, it would
    sometimes read data that is not there yet.

    Args:
        device: The CUDA device.
    """

    pins = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def fence(self) -> torch.cuda.Event:
        """See :meth:`Transport.fence`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def place(self) -> Callable[[], AbstractContextManager[Any]]:
        """See :meth:`Transport.place`: the place is the caller's stream."""
        stream = torch.cuda.current_stream(self._device)
        return lambda: torch.cuda.stream(stream)

    def fetch(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str) -> Ticket:
        """See :meth:`Transport.fetch`."""
        return self._launch(self._down, sources, targets, self.fence(), sources)

    def send(
        self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str, after: torch.cuda.Event | None = None
    ) -> Ticket:
        """See :meth:`Transport.send`."""
        return self._launch(self._up, sources, targets, after, targets)

    def _launch(
        self,
        stream: torch.cuda.Stream,
        sources: Sequence[Tensor],
        targets: Sequence[Tensor],
        after: torch.cuda.Event | None,
        on_device: Sequence[Tensor],
    ) -> Ticket:
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.device(self._device), torch.cuda.stream(stream), torch.no_grad():
            if stream is self._down:
                sources = list(map(_as_in, sources, targets))
            copy_all(sources, targets, non_blocking=True)
            done = torch.cuda.Event(blocking=True)
            done.record(stream)
        for tensor in on_device:
            # Their owner may free them at once: the allocator must not give the memory away before the copy is done.
            tensor.record_stream(stream)
        return _Launched(done, self._device)


def _as_in(source: Tensor, target: Tensor) -> Tensor:
    """The source, with its elements in memory in the target's order.

    Otherwise torch would copy to other host memory first, and reorder from there at once, before that copy is done.
    """
    if same_order(source, target) and source.dtype == target.dtype and not is_lazy(source):
        return source
    size, strides = target.shape, target.stride()
    return torch.empty_strided(size, strides, dtype=target.dtype, device=source.device).copy_(source)
