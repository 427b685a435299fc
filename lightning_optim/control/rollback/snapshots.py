"""Copies of what a step changes, made in the background.

Between two steps weights and optimizer state stay as they are, so that there is time to copy them: on the CPU in a
thread (torch's copies release the interpreter lock), on CUDA in a stream of their own. The buffers are allocated once.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_optim.engines.host_memory import host_memory
from lightning_optim.engines.memory import is_dense, is_lazy
from lightning_optim.stepping.shards import is_distributed, local
from lightning_optim.warnings import warn_once

#: Where copies of CUDA tensors are: beside them, or in pinned memory of the host.
Where = Literal["device", "host"]
WHERE = ("device", "host")

#: Bytes of a slab of pinned memory. Torch rounds its size up to a power of two, so that a slab of this size wastes
#: nothing; only the last slab, and larger ones, may.
SLAB = 256 * 2**20

_Form = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


class Snapshots:
    """A copy of the contents of some tensors, in buffers that are kept.

    Args:
        tensors: Returns the tensors, at every :meth:`begin` anew. Of sharded ones, this process's part is copied.
        where: Where copies of CUDA tensors are; other tensors are copied on their own device.

    Raises:
        ValueError: ``where`` is not valid.

    Example:
        >>> weight = torch.tensor([1.0, 2.0])
        >>> snapshot = Snapshots(lambda: [weight])
        >>> snapshot.begin()
        >>> snapshot.wait()
        >>> weight.mul_(10)
        tensor([10., 20.])
        >>> snapshot.restore()
        [tensor([1., 2.])]
        >>> weight
        tensor([1., 2.])
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], where: Where = "device") -> None:
        if where not in WHERE:
            raise ValueError(f"where={where!r}; valid: {', '.join(WHERE)}")
        self._tensors = tensors
        self._where = where
        self._pool: dict[_Form, list[Tensor]] = {}
        self._taken: list[tuple[Callable[[], Tensor | None], Tensor, torch.device]] = []
        self._sources: list[Tensor] = []  # kept alive while they are read
        self._thread: ThreadPoolExecutor | None = None
        self._job: Future[None] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._copied: list[tuple[torch.device, torch.cuda.Event]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffers in self._pool.values() for buffer in buffers)

    @torch.no_grad()
    def begin(self, *, background: bool = True) -> None:
        """Begin to copy; the tensors must not be changed until :meth:`wait` has returned.

        Args:
            background: Copy in a thread, or on CUDA in a stream of its own. If False, tensors may be changed at once
                (those on CUDA in the current stream).

        Raises:
            MemoryError: There is no room for the buffers.
        """
        self.wait()
        given = list(self._tensors())
        sources = list(map(local, given))
        buffers = self._buffers(sources)
        # A sharded tensor cannot be made again from its part alone, so it is kept alive.
        references = [partial(_same, t) if is_distributed(t) else weakref.ref(t) for t in given]
        self._taken = list(zip(references, buffers, (source.device for source in sources), strict=True))
        by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for source, buffer in zip(sources, buffers, strict=True):
            by_device[source.device][0].append(buffer)
            by_device[source.device][1].append(source)
        self._sources = sources if background else []
        for device, (to, of) in by_device.items():
            if background and device.type == "cpu":
                if self._thread is None:
                    self._thread = ThreadPoolExecutor(1, thread_name_prefix="lightning_optim.snapshot")
                self._job = self._thread.submit(_copy, to, of)
            elif background and device.type == "cuda":
                self._copy_beside(device, to, of)
            else:
                _copy(to, of)

    def wait(self) -> None:
        """Wait until the copy is complete: the host waits for CPU tensors, the current stream for CUDA tensors."""
        job, self._job = self._job, None
        if job is not None:
            job.result()
        for device, event in self._copied:
            torch.cuda.current_stream(device).wait_event(event)
        self._copied, self._sources = [], []

    @torch.no_grad()
    def restore(self) -> list[Tensor]:
        """Write the copied contents back.

        Returns:
            The tensors, in their order. In place of a tensor that no longer exists, there is a new one.
        """
        self.wait()
        found, to, of = [], [], []
        for reference, buffer, device in self._taken:
            tensor = reference()
            if tensor is None:
                found.append(buffer.to(device, copy=True))
            else:
                found.append(tensor)
                to.append(local(tensor))
                of.append(buffer)
        if to:
            _copy(to, of)
        return found

    def release(self) -> None:
        """Free the buffers and end the thread."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        self._pool, self._taken = {}, []

    def _copy_beside(self, device: torch.device, to: list[Tensor], of: list[Tensor]) -> None:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        # The copy comes after all work launched before: the last step, and a restore that reads the same buffers.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            _copy(to, of)
            self._copied.append((device, stream.record_event()))

    def _buffers(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """A buffer for each source: existing ones are used where they fit, and those left over are freed."""
        free, pool = self._pool, defaultdict[_Form, list[Tensor]](list)
        forms = [(t.size(), t.stride(), t.dtype, t.device) for t in sources]
        found: list[Tensor | None] = []
        for form in forms:
            buffer = free[form].pop() if free.get(form) else None
            found.append(buffer)
            if buffer is not None:
                pool[form].append(buffer)
        self._taken, self._pool = [], pool
        free.clear()
        new = [index for index, buffer in enumerate(found) if buffer is None]
        for index, buffer in zip(new, self._allocated([sources[index] for index in new]), strict=True):
            found[index] = buffer
            pool[forms[index]].append(buffer)
        return found  # type: ignore[return-value] # no None is left

    def _allocated(self, sources: Sequence[Tensor]) -> list[Tensor]:
        pinned = [source.device.type == "cuda" and self._where == "host" for source in sources]
        try:
            _check_free(sum(t.nbytes for t, pin in zip(sources, pinned, strict=True) if pin or t.device.type == "cpu"))
            slabs = iter(_pinned_like([source for source, pin in zip(sources, pinned, strict=True) if pin]))
            return [
                next(slabs) if pin else torch.empty_like(source) for source, pin in zip(sources, pinned, strict=True)
            ]
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, as is the CPU's
            more = sum(source.nbytes for source in sources)
            devices = " and ".join(sorted({str(source.device) for source in sources}))
            where = "pinned host memory" if any(pinned) else devices
            raise MemoryError(
                f"a snapshot of {len(sources)} tensors needs {more / 2**20:.1f} MiB of {where}, on top of "
                f"{self.nbytes / 2**20:.1f} MiB that it has: {error}"
            ) from error


def _same(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()  # this is a setting of each thread, and the copy may run in another one
def _copy(to: list[Tensor], of: list[Tensor]) -> None:
    if not any(map(is_lazy, to)):
        torch._foreach_copy_(to, of, non_blocking=True)
        return
    for one, other in zip(to, of, strict=True):  # foreach copies cannot write lazily negated or conjugated tensors
        one.copy_(other, non_blocking=True)


def _pinned_like(sources: Sequence[Tensor]) -> Iterator[Tensor]:
    """Buffers in pinned memory, many to a slab."""
    sizes = [-(-source.nbytes // 64) * 64 for source in sources]
    slab, offset = torch.empty(0, dtype=torch.uint8, device="cpu"), 0
    for index, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        if offset + size > slab.numel():
            slab, offset = _slab(max(size, min(sum(sizes[index:]), SLAB))), 0
        flat = slab[offset : offset + source.nbytes].view(source.dtype)
        offset += size
        # Elements keep their order in memory, so that each copy is of one piece of memory.
        yield flat.as_strided(source.size(), source.stride()) if is_dense(source) else flat.view(source.size())


def _check_free(needed: int) -> None:
    """Check that memory is free: Linux promises more than there is, and kills the process that uses it."""
    if needed <= SLAB:  # not worth the check, which reads some files
        return
    try:
        memory = host_memory()
    except RuntimeError:  # unknown
        return
    if needed > memory.free:
        raise MemoryError(f"{memory.free / 2**20:.1f} MiB are free ({memory.source})")


def _slab(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:  # the limit of locked memory, or no driver
        warn_once(
            f"snapshots of CUDA tensors are in pageable memory of the host ({error}); they are right, but slower",
            key="snapshots: pageable",
        )
        return torch.empty(size, dtype=torch.uint8, device="cpu")
