"""The host engine: a compiled loop over all tensors of a bucket, one read and one write of memory."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from lightning_optim.engines.base import Bucket, Layout, Scalars, flat_memory
from lightning_optim.engines.cache import BuildError
from lightning_optim.engines.compiled import CompiledEngine
from lightning_optim.engines.host.build import load
from lightning_optim.engines.host.printer import C_TYPES, CPrinter
from lightning_optim.engines.host.threads import thread_count
from lightning_optim.engines.host.toolchain import ToolchainError, find_toolchain
from lightning_optim.engines.progress import Progress, Write
from lightning_optim.engines.scaling import Scaling
from lightning_optim.rules.program import Program
from lightning_optim.warnings import warn_once

#: Elements of a full chunk: small enough that a model of a million weights divides evenly over threads, large
#: enough that a chunk's fixed cost (about 30 ns) is nothing beside its memory time (16 Ki × 28 B at 30 GB/s: 15 µs).
CHUNK = 1 << 14
#: Under this many elements a parallel region costs more than it saves.
SERIAL_ELEMENTS = 1 << 15
#: Words of scratch for a thread's place in the list of chunks: a cache line each, so that threads do not share one.
PART_WORDS = 8


@dataclass(frozen=True)
class Kernel:
    """A compiled Program.

    Attributes:
        function: The compiled function ``lo_run``.
        table_scalars: The columns of the table.
        work: Doubles of scratch for each tensor.
        reductions: Doubles of scratch for each chunk.
        results: Doubles returned for each tensor.
    """

    function: Callable[..., None]
    table_scalars: tuple[str, ...]
    work: int
    reductions: int
    results: int


@dataclass(frozen=True)
class Chunks:
    """How the elements of a list of tensors are divided into chunks, and these over threads.

    Attributes:
        numel: Number of elements of each tensor.
        tensor: For each chunk, its tensor.
        begin: For each chunk, the place of its first element in the tensor.
        bounds: The first chunk of each thread, and the end.
        parts: Number of threads.
    """

    numel: array[int]
    tensor: array[int]
    begin: array[int]
    bounds: array[int]
    parts: int


@lru_cache(maxsize=64)  # a model has a few distinct buckets; each entry is a few kilobytes per hundred tensors
def _divide(sizes: tuple[int, ...], threads: int) -> Chunks:
    """Cut tensors into chunks, and the chunks into runs of about equal numbers of elements."""
    tensor, begin, bounds = array("q"), array("q"), array("q", [0])
    total = sum(sizes)
    parts = threads if total >= SERIAL_ELEMENTS else 1
    done = 0
    for index, size in enumerate(sizes):
        for start in range(0, size, CHUNK):
            if done >= total * len(bounds) / parts:
                bounds.append(len(tensor))
            tensor.append(index)
            begin.append(start)
            done += min(CHUNK, size - start)
    bounds.extend([len(tensor)] * (parts + 1 - len(bounds)))
    return Chunks(array("q", sizes), tensor, begin, bounds, parts)


class HostEngine(CompiledEngine[Kernel]):
    """Runs element-wise and reducing updates on dense CPU tensors of any mixture of floating-point types."""

    name = "host"

    def unavailable(self) -> str | None:
        """See :meth:`Engine.unavailable`."""
        try:
            find_toolchain()
        except ToolchainError as error:
            return str(error)
        return None

    def rejects(self, bucket: Bucket) -> str | None:
        """See :meth:`Engine.rejects`; compiles the kernel, so that a failed build is known before the first step."""
        if bucket.device.type != "cpu":
            return f"the weights are on {bucket.device}, not on the CPU"
        if (reason := flat_memory(bucket, C_TYPES) or CPrinter.lacks(bucket.update.program)) is not None:
            return reason
        for program in (*(phase.program for phase in bucket.update.program.phases), bucket.update.program):
            self._built(program, bucket.layout)
        return None

    def build(self, program: Program, layout: Layout) -> Kernel:
        """See :meth:`CompiledEngine.build`."""
        return _build(program, layout)

    def run(self, bucket: Bucket, table: Sequence[Scalars], scaling: Scaling | None = None) -> None:
        """See :meth:`Engine.run`."""
        progress = bucket.progress or Progress()
        if progress.begun:
            progress.finish()
            return
        calls, _ = self._calls(bucket, bucket.update.program, table)
        progress.write(calls)

    def reduce(
        self, bucket: Bucket, program: Program, table: Sequence[Scalars], scaling: Scaling | None = None
    ) -> Tensor:
        """See :meth:`Engine.reduce`."""
        calls, results = self._calls(bucket, program, table)
        Progress().write(calls)
        return torch.frombuffer(results, dtype=torch.float64).view(len(bucket), -1).sum(0)

    def _calls(self, bucket: Bucket, program: Program, table: Sequence[Scalars]) -> tuple[list[Write], array[float]]:
        """The calls that run a Program's kernel on a bucket, and the array that they fill with its results."""
        kernel = self._built(program, bucket.layout)
        columns = kernel.table_scalars
        numbers = array("d", [float(group[name]) for group in table for name in columns])
        if bucket.addresses is None or (bucket.step_addresses is None) != (bucket.steps is None):
            raise ValueError("the host engine needs the addresses of the bucket's tensors: see Bucket.locate()")
        return self._prepared(
            kernel, bucket.addresses, bucket.sizes, bucket.step_addresses, bucket.groups, bucket.ids, numbers
        )

    def sum_of_squares(self, bucket: Bucket) -> Tensor:
        """See :meth:`Engine.sum_of_squares`."""
        try:
            kernel = self._built_norm(bucket)
        except BuildError as error:
            warn_once(f"lightning-optim: clipping by torch's own operators ({error})", key="no norm kernel")
            return super().sum_of_squares(bucket)
        if bucket.addresses is None:
            raise ValueError("the host engine needs the addresses of the bucket's tensors: see Bucket.locate()")
        count, field = len(bucket), bucket.update.program.tensors.index("g")
        zeros = array("i", bytes(4 * count))
        data = bucket.addresses[field * count : (field + 1) * count]
        calls, norms = self._prepared(kernel, data, bucket.sizes, None, zeros, zeros, array("d", [0.0]))
        Progress().write(calls)
        return torch.tensor([sum(x * x for x in norms)], dtype=torch.float64, device="cpu")

    def _prepared(
        self,
        kernel: Kernel,
        data: array[int],
        sizes: tuple[int, ...],
        steps: array[int] | None,
        groups: array[int],
        ids: array[int],
        table: array[float],
    ) -> tuple[list[Write], array[float]]:
        """The calls that run a kernel on tensors and counters at these addresses, and the array for its results."""
        count = len(groups)
        chunks = _divide(sizes, thread_count())
        work = array("d", bytes(8 * (kernel.work * count + PART_WORDS * chunks.parts)))
        partials = array("d", bytes(8 * kernel.reductions * len(chunks.tensor)))
        results = array("d", bytes(8 * kernel.results * count))
        call = partial(
            kernel.function,
            count,
            data.buffer_info()[0],
            chunks.numel.buffer_info()[0],
            None if steps is None else steps.buffer_info()[0],
            groups.buffer_info()[0],
            ids.buffer_info()[0],
            table.buffer_info()[0],
            len(chunks.tensor),
            chunks.tensor.buffer_info()[0],
            chunks.begin.buffer_info()[0],
            CHUNK,
            chunks.bounds.buffer_info()[0],
            chunks.parts,
            work.buffer_info()[0],
            partials.buffer_info()[0],
            results.buffer_info()[0],
        )
        # The second call only keeps the arrays alive whose addresses the first one has, until both are done.
        return [call, partial(len, (data, chunks, steps, groups, ids, table, work, partials))], results


def _build(program: Program, layout: Layout) -> Kernel:
    printer = CPrinter(program, layout)
    function = load(printer.source(), find_toolchain()).lo_run
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    chunks = [integer, pointer, pointer, integer, pointer, ctypes.c_int]
    function.argtypes = [integer, *[pointer] * 6, *chunks, *[pointer] * 3]  # type: ignore[list-item] # ctypes' own
    function.restype = None
    return Kernel(
        function,
        tuple(printer.table_scalars),
        printer.width,
        printer.reductions,
        len(program.results),
    )
