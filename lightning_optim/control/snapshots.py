"""Copies of what a step changes, made while others compute.

Between two steps weights and optimizer state stay as they are, so that there is time to copy them: on the CPU in a
thread (torch's copies release the interpreter lock), on CUDA in a stream of their own. The buffers are allocated once.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.control.learning_rates import GROUP_RATES, all_groups, with_inner
from lightning_optim.engines.host_memory import host_memory
from lightning_optim.engines.memory import is_dense
from lightning_optim.optimizers.shards import is_distributed, local
from lightning_optim.warnings import warn_once

#: Where copies of CUDA tensors are: beside them, or in pinned memory of the host.
Where = Literal["device", "host"]
WHERE = ("device", "host")

#: Pinned memory comes in powers of two, so that slabs of this size waste nothing (but the last; and what is larger).
SLAB = 256 * 2**20

_Form = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


class Snapshots:
    """A copy of the contents of some tensors, in buffers that are kept.

    Args:
        tensors: Gives the tensors, at every :meth:`begin` anew. Of sharded ones it is this process's part.
        where: Of copies of CUDA tensors; others are copied beside themselves.

    Raises:
        ValueError: Another ``where``.

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
        """Bytes of the buffers that there are."""
        return sum(buffer.nbytes for buffers in self._pool.values() for buffer in buffers)

    @torch.no_grad()
    def begin(self, *, background: bool = True) -> None:
        """Begin to copy; the tensors must not be changed until :meth:`wait` has returned.

        Args:
            background: In a thread, or in a stream of its own. If not, tensors may be changed at once (CUDA's in the
                present stream).

        Raises:
            MemoryError: There is no room for the buffers.
        """
        self.wait()
        given = list(self._tensors())
        sources = list(map(local, given))
        buffers = self._buffers(sources)
        # A sharded tensor cannot be made again from its part alone: it is kept.
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
        """Wait until the copy is complete: the host for copies of the CPU, the present stream for those of CUDA."""
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
            The tensors, in their order. One that no longer exists is a new one.
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
        # After all that was launched before: the last step, and a restore that reads the same buffers.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            _copy(to, of)
            self._copied.append((device, stream.record_event()))

    def _buffers(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """One for each, of those that there are as far as they fit; what is left over is freed."""
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


class StepSnapshot:
    """Everything that steps of an optimizer change: weights, state, counters, options but the learning rate.

    Args:
        optimizer: The optimizer; those that it wraps are included.
        more: Gives further tensors that a step changes, such as masters.
        where: As of :class:`Snapshots`.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> snapshot = StepSnapshot(optimizer)
        >>> snapshot.begin()
        >>> snapshot.wait()
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        >>> snapshot.restore()
        >>> weight.item(), dict(optimizer.state)
        (1.0, {})
    """

    def __init__(
        self,
        optimizer: Optimizer,
        more: Callable[[], Iterable[Tensor]] = tuple,
        where: Where = "device",
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._more = more
        self._leaves: list[Tensor] = []
        self._states: list[dict[Any, Any]] = []
        self._groups: list[dict[str, Any]] = []
        self.snapshots = Snapshots(self._collected, where)
        self.taken = False

    def begin(self, *, background: bool = True) -> None:
        """As of :class:`Snapshots`.

        Raises:
            MemoryError: There is no room for the buffers.
            TypeError: The state has something that is neither a tensor nor a primitive.
        """
        self.taken = False
        self.snapshots.begin(background=background)
        self._leaves = []
        self.taken = True

    def wait(self) -> None:
        """As of :class:`Snapshots`."""
        self.snapshots.wait()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, bit for bit; slots that did not exist then are gone."""
        tensors = self.snapshots.restore()
        optimizer = self._live()
        states = {id(one.state): one.state for one in with_inner(optimizer)}.values()
        for state, then in zip(states, self._states, strict=True):
            _put(then, state, tensors)
        for group, then in zip(all_groups(optimizer), self._groups, strict=False):  # others were added since
            _put(then, group, tensors, keep=("params", *GROUP_RATES))

    def release(self) -> None:
        """As of :class:`Snapshots`."""
        self.snapshots.release()
        self.taken, self._states, self._groups = False, [], []

    def _live(self) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None  # noqa: S101 # who asks holds it
        return optimizer

    def _collected(self) -> list[Tensor]:
        optimizer = self._live()
        groups = all_groups(optimizer)
        unique = {id(p): p for group in groups for p in group["params"] if p.requires_grad or p.grad is not None}
        leaves = [*unique.values(), *self._more()]
        states = {id(one.state): one.state for one in with_inner(optimizer)}.values()
        name = type(optimizer).__name__
        self._states = [_taken(state, leaves, f"{name}'s state") for state in states]
        self._groups = [
            {
                key: _taken(value, leaves, None)
                for key, value in group.items()
                if key != "params" and key not in GROUP_RATES
            }
            for group in groups
        ]
        return leaves


class _Leaf:
    """The place of a tensor among those of a snapshot."""

    def __init__(self, index: int) -> None:
        self.index = index


def _taken(value: Any, leaves: list[Tensor], owner: str | None) -> Any:
    """A copy of containers and primitives, with :class:`_Leaf` for tensors, which go to ``leaves``.

    Args:
        value: The value.
        leaves: Where tensors are put.
        owner: Whose it is, for the message; None: what is of other types is kept as it is.
    """
    if isinstance(value, Tensor):
        leaves.append(value)
        return _Leaf(len(leaves) - 1)
    if isinstance(value, dict):
        return {key: _taken(inner, leaves, owner) for key, inner in value.items()}
    if type(value) in (list, tuple, deque):
        return type(value)(_taken(inner, leaves, owner) for inner in value)
    primitive = value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype)
    if owner is not None and not primitive and not isinstance(value, torch.device | torch.Size):
        raise TypeError(
            f"{owner} has a {type(value).__name__}, which a snapshot cannot copy; valid: tensors, numbers, strings, "
            "None, and lists, tuples, deques and dicts of them"
        )
    return value


def _put(then: Any, now: Any, tensors: Sequence[Tensor], keep: Sequence[str] = ()) -> Any:
    """The value of a snapshot, in the very containers that there are now where these are of the same kind.

    Args:
        then: Of :func:`_taken`.
        now: What is in its place.
        tensors: Those of the snapshot.
        keep: Keys of a dict that are left alone.
    """
    if isinstance(then, _Leaf):
        return tensors[then.index]
    if isinstance(then, dict):
        into: dict[Any, Any] = now if isinstance(now, dict) else {}
        for key in [key for key in into if key not in then and key not in keep]:
            del into[key]
        into.update({key: _put(inner, into.get(key), tensors) for key, inner in then.items()})
        return into
    if type(then) in (list, deque):
        old = list(now) if type(now) is type(then) else []
        values = [_put(inner, old[i] if i < len(old) else None, tensors) for i, inner in enumerate(then)]
        row = now if type(now) is type(then) else type(then)()
        row.clear()
        row.extend(values)
        return row
    if type(then) is tuple:
        return tuple(_put(inner, None, tensors) for inner in then)
    return then


def _same(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()  # in a thread of its own, gradients would be recorded again
def _copy(to: list[Tensor], of: list[Tensor]) -> None:
    torch._foreach_copy_(to, of, non_blocking=True)


def _pinned_like(sources: Sequence[Tensor]) -> Iterator[Tensor]:
    """Buffers in pinned memory, many to a slab."""
    sizes = [-(-source.nbytes // 64) * 64 for source in sources]
    slab, offset = torch.empty(0, dtype=torch.uint8, device="cpu"), 0
    for index, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        if offset + size > slab.numel():
            slab, offset = _slab(max(size, min(sum(sizes[index:]), SLAB))), 0
        flat = slab[offset : offset + source.nbytes].view(source.dtype)
        offset += size
        # In the order in which the elements lie, so that each copy is of one piece of memory.
        yield flat.as_strided(source.size(), source.stride()) if is_dense(source) else flat.view(source.size())


def _check_free(needed: int) -> None:
    """Linux promises more memory than there is, and ends the process that uses it."""
    if needed <= SLAB:  # not worth the question, which reads some files
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
