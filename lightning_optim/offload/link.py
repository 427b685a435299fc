"""A simulated link to a device: copies take the time that they would take on a real one."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.checks import NONNEGATIVE, POSITIVE, check_number
from lightning_optim.offload.trace import Trace
from lightning_optim.offload.transport import Ticket, Transport, copy_all


class _Awaited(Ticket):
    """A copy that a thread is going to do."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None

    def wait(self) -> None:
        self.done.wait()
        if self.error is not None:
            raise self.error


class _Lane:
    """One direction: a thread that does copies one after the other, and sleeps as long as they would take."""

    def __init__(self, kind: str, link: SimulatedLink) -> None:
        self.kind, self._link = kind, link
        self._jobs: queue.SimpleQueue[tuple[list[Tensor], list[Tensor], str, _Awaited] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"simulated link, {kind}", daemon=True)
        self._thread.start()

    def submit(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str) -> Ticket:
        ticket = _Awaited()
        self._jobs.put((list(sources), list(targets), label, ticket))
        return ticket

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        link = self._link
        while (job := self._jobs.get()) is not None:
            sources, targets, label, ticket = job
            begin = time.perf_counter()
            seconds = link.latency + sum(t.nbytes for t in sources) / link.bandwidth
            seconds *= 1 + link.jitter * link.random.random()
            if link.poison:  # copy at the end, so that early reads of targets, and early writes to sources, show
                time.sleep(seconds)
            try:
                copy_all(sources, targets)
            except BaseException as error:  # whoever waits for the copy must know
                ticket.error = error
            time.sleep(max(0.0, begin + seconds - time.perf_counter()))
            if link.trace is not None:
                link.trace.add(self.kind, label, begin)
            ticket.done.set()
            del job, sources, targets, ticket  # or they would be kept until the next copy


class SimulatedLink(Transport):
    """A full-duplex link of a given bandwidth and latency, between two places in host memory.

    Its threads sleep while a copy "travels", so that it can be seen what runs beside it. On request, targets hold NaN
    until their copy is done, so that reads that come too early can be seen as well.

    Args:
        bandwidth: Bytes per second, in each direction.
        latency: Seconds before a copy begins.
        jitter: Copies take up to this share longer, at random.
        poison: Fill targets with NaN until their copy is done, at the end of its time.
        seed: The seed of the jitter.
        trace: Where copies are recorded.

    Raises:
        ValueError: The bandwidth is not positive, or the latency or jitter is below 0.

    >>> link = SimulatedLink(1e9)
    >>> source, target = torch.ones(3), torch.zeros(3)
    >>> link.fetch([source], [target], "gradients").wait()
    >>> target
    tensor([1., 1., 1.])
    >>> link.close()
    """

    def __init__(
        self,
        bandwidth: float,
        latency: float = 0.0,
        *,
        jitter: float = 0.0,
        poison: bool = False,
        seed: int = 0,
        trace: Trace | None = None,
    ) -> None:
        check_number("", "bandwidth", bandwidth, POSITIVE.described("bytes per second, more than 0"))
        for name, value in (("latency", latency), ("jitter", jitter)):
            check_number("", name, value, NONNEGATIVE.described("seconds, 0 or more"))
        self.bandwidth, self.latency, self.jitter, self.poison = bandwidth, latency, jitter, poison
        self.random = random.Random(seed)  # noqa: S311 # not for secrets
        self.trace = trace
        self._down, self._up = _Lane("fetch", self), _Lane("send", self)

    def fetch(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str) -> Ticket:
        """See :meth:`Transport.fetch`."""
        self._spoil(targets)
        return self._down.submit(sources, targets, label)

    def send(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str, after: Any = None) -> Ticket:
        """See :meth:`Transport.send`."""
        self._spoil(targets)
        return self._up.submit(sources, targets, label)

    def close(self) -> None:
        """See :meth:`Transport.close`."""
        self._down.close()
        self._up.close()

    @torch.no_grad()
    def _spoil(self, targets: Sequence[Tensor]) -> None:
        if self.poison:
            for target in targets:
                target.fill_(float("nan"))
