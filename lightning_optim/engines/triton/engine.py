"""The Triton engine: hundreds of tensors in one launch, through tables of pointers; nothing waits for the device."""

from __future__ import annotations

import contextlib
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.base import Bucket, Layout, Scalars, flat_memory
from lightning_optim.engines.compiled import CompiledEngine
from lightning_optim.engines.progress import Progress, Write
from lightning_optim.engines.scaling import Scaling
from lightning_optim.engines.triton.build import Kernels, broken, build, interpreted, missing
from lightning_optim.engines.triton.printer import TRITON_TYPES, TritonPrinter
from lightning_optim.rules.program import Program

#: Elements of a chunk, the work of one program: large enough that its tables and scalars (a few dozen bytes) are
#: nothing beside it, small enough that a model of a million weights still fills the GPU.
CHUNK = 8192
#: Elements that a program handles at a time, with so many warps: 32 registers a thread for AdamW on sm_90, where
#: 4096 elements need 234.
BLOCK = 1024
#: Fused multiply-add as in torch's own kernels, whatever Triton's default is (3.10 changes it).
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
#: Tensors, or partial sums, that a scalar kernel handles at a time.
LANES = 256
#: Parts of the sum of squares that one program adds up at a time: a model of 7e9 weights has 850,000 of them.
PARTS = 2048


class Mirror:
    """An array of 64-bit words that the device has a copy of.

    A copy is sent only when a word has changed, from pinned memory of torch's caching allocator, which is not used
    again before the copy is done: the host neither waits nor overwrites what is still being read.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(0, dtype=dtype, device=device)
        self._sent: array[Any] = array("q" if dtype == torch.int64 else "d")

    def send(self, words: array[Any]) -> Tensor:
        """Make the device's copy equal to ``words``, for all that is launched from here on."""
        if words != self._sent:
            if len(words) == len(self.tensor):
                self.tensor.copy_(_pinned(words, self.tensor.dtype, self.tensor.device), non_blocking=True)
            else:
                self.tensor = _sent(words, self.tensor.dtype, self.tensor.device)
            self._sent = words
        return self.tensor


def _pinned(words: array[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The contents of an array, in memory from which a device reads without making the host wait."""
    source = torch.frombuffer(words, dtype=dtype) if words else torch.zeros(0, dtype=dtype, device="cpu")
    return source.clone() if device.type == "cpu" else source.pin_memory()


def _sent(words: array[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy of an array on the device."""
    return _pinned(words, dtype, device).to(device, non_blocking=True)


@dataclass
class Tables:
    """The data of a bucket on the device.

    Attributes:
        stride: Length of a line of addresses: even, so that every line is aligned to 16 bytes.
        chunks: Number of chunks.
        numel, groups, ids, first_chunk: One entry for each tensor.
        chunk_tensor, chunk_begin: One entry for each chunk.
        work, partials, skip: Scratch: see :class:`~lightning_optim.engines.triton.printer.TritonPrinter`.
        never: Stands in for ``skip`` in kernels that always run.
        addresses: The addresses of all tensors and counters, in one line for each name.
        numbers: The table, and after it the norm to clip to.
    """

    stride: int
    chunks: int
    numel: Tensor
    groups: Tensor
    ids: Tensor
    first_chunk: Tensor
    chunk_tensor: Tensor
    chunk_begin: Tensor
    work: Tensor
    partials: Tensor
    skip: Tensor
    never: Tensor
    addresses: Mirror
    numbers: Mirror


class TritonEngine(CompiledEngine[Kernels]):
    """Runs element-wise and reducing updates on dense CUDA tensors of any mixture of floating-point types.

    A step of a bucket is two launches for an element-wise rule, three with clipping or a loss scale, whatever the
    number of tensors and param groups; rules with norms add two for each pass. No launch depends on the value of a
    learning rate or of any other scalar, so that nothing is compiled when they change.
    """

    name = "triton"
    controls_on_device = True

    def __init__(self) -> None:
        super().__init__()
        # For each bucket, the tables of each Program that runs on it, by fingerprint.
        self._tables: weakref.WeakKeyDictionary[Bucket, dict[str, Tables]] = weakref.WeakKeyDictionary()

    def unavailable(self) -> str | None:
        """See :meth:`Engine.unavailable`."""
        if (reason := missing()) is not None:
            return reason
        if interpreted():
            return None
        return broken() if torch.cuda.is_available() else "there is no CUDA device"

    def rejects(self, bucket: Bucket) -> str | None:
        """See :meth:`Engine.rejects`."""
        wanted = "cpu" if interpreted() else "cuda"
        if bucket.device.type != wanted:
            where = "on the CPU, since Triton is interpreted" if interpreted() else "on a CUDA device"
            return f"the weights are on {bucket.device}, not {where}"
        program = bucket.update.program
        if (reason := flat_memory(bucket, TRITON_TYPES) or TritonPrinter.lacks(program)) is not None:
            return reason
        for part in (*(phase.program for phase in program.phases), program):
            self._built(part, bucket.layout)
        return None

    def build(self, program: Program, layout: Layout) -> Kernels:
        """See :meth:`CompiledEngine.build`; Triton itself compiles at the first launch."""
        return build(program, layout)

    def sum_of_squares(self, bucket: Bucket) -> Tensor:
        """See :meth:`Engine.sum_of_squares`: one part for each chunk, in a fixed order and so deterministic."""
        tables = self._prepared(bucket)
        tables.addresses.send(_addresses(bucket, tables.stride))
        empty = torch.empty if tables.chunks else torch.zeros
        squares = empty(self.parts(bucket), dtype=torch.float64, device=bucket.device)
        self.launch_squares(bucket, squares)
        return squares

    def run(self, bucket: Bucket, table: Sequence[Scalars], scaling: Scaling | None = None) -> None:
        """See :meth:`Engine.run`."""
        scaling, progress = scaling or Scaling(), bucket.progress or Progress()
        with _on(bucket.device):
            if progress.begun:
                progress.finish()
            else:
                self.send(bucket, table, scaling.max_norm)
                progress.write(self._launches(bucket, scaling))

    def reduce(
        self, bucket: Bucket, program: Program, table: Sequence[Scalars], scaling: Scaling | None = None
    ) -> Tensor:
        """See :meth:`Engine.reduce`. If the step is left out, the sums have no meaning."""
        scaling = scaling or Scaling()
        with _on(bucket.device):
            self.send(bucket, table, scaling.max_norm, program)
            for launch in self._launches(bucket, scaling, program):
                launch()
            kernels, tables = self._built(program, bucket.layout), self._prepared(bucket, program)
            numbers = tables.work.view(len(bucket), kernels.width)
            return torch.stack([numbers[:, slot].sum() for slot in kernels.results])

    def send(
        self, bucket: Bucket, table: Sequence[Scalars], max_norm: float | None, program: Program | None = None
    ) -> None:
        """Send this step's own data to the device: addresses, the table, the norm to clip to.

        Args:
            bucket: The bucket.
            table: As in :meth:`run`.
            max_norm: The norm to clip to.
            program: The Program that is launched next; default: the bucket's update.

        Raises:
            RuntimeError: A CUDA graph is being recorded, which would keep this step's addresses and scalars for ever.
        """
        if bucket.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "an optimizer's step inside of a CUDA graph would be frozen with its learning rate and addresses; "
                "valid: leave the step out of the graph, and record it with optimizer.capture_steps()"
            )
        program = program or bucket.update.program
        kernels, tables = self._built(program, bucket.layout), self._prepared(bucket, program)
        numbers = [group[name] for group in table for name in kernels.table_scalars]
        on_device = {place: value for place, value in enumerate(numbers) if isinstance(value, Tensor)}
        words = array("d", [0.0 if place in on_device else float(value) for place, value in enumerate(numbers)])
        words.append(max_norm if max_norm is not None else 0.0)
        tables.addresses.send(_addresses(bucket, tables.stride))
        sent = tables.numbers.send(words)
        for place, value in on_device.items():
            sent[place].copy_(value)

    def parts(self, bucket: Bucket) -> int:
        """The number of parts of a bucket's sum of squares."""
        return max(self._prepared(bucket).chunks, 1)

    def launch_squares(self, bucket: Bucket, squares: Tensor) -> None:
        """Make the launch of :meth:`sum_of_squares`, after the addresses have been sent to the device.

        Args:
            bucket: The bucket.
            squares: The tensor that gets the parts; it is left as it is if there are no chunks.
        """
        kernels, tables = self._built_norm(bucket), self._prepared(bucket)
        if not tables.chunks:
            return
        field = bucket.update.program.tensors.index("g")
        with _on(bucket.device):
            kernels.sweeps[0][(tables.chunks,)](
                tables.addresses.tensor[field * tables.stride :], tables.numel, tables.chunk_tensor,
                tables.chunk_begin, tables.work, squares, tables.never, tables.stride,
                CHUNK=CHUNK, BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip

    def launch(self, bucket: Bucket, scaling: Scaling) -> None:
        """Make the launches of :meth:`run`, after its data have been sent to the device."""
        with _on(bucket.device):
            for launch in self._launches(bucket, scaling):
                launch()

    def _launches(self, bucket: Bucket, scaling: Scaling, program: Program | None = None) -> list[Write]:
        program = program or bucket.update.program
        kernels, tables = self._built(program, bucket.layout), self._prepared(bucket, program)
        addresses, sent = tables.addresses.tensor, tables.numbers.tensor
        loss, device = scaling.loss, bucket.device
        squares = _here(scaling.squares, device)
        scale, found = (_here(loss.scale, device), _here(loss.found_inf, device)) if loss else (None, None)
        launches: list[Write] = [
            partial(
                kernels.scalars[0][(1,)],
                addresses, tables.numel, tables.groups, tables.ids, sent,
                *(sent if it is None else it for it in (squares, scale, found)), sent[-1:], tables.work, tables.skip,
                len(bucket), tables.stride, 0 if squares is None else squares.numel(),
                CLIP=scaling.max_norm is not None, UNSCALE=scale is not None,
                CHECK=loss is not None and loss.check and squares is not None, SKIP=loss is not None,
                LANES=LANES, PARTS=PARTS, enable_fp_fusion=True,
            )
        ]  # fmt: skip
        if loss is not None and found is not None and found is not loss.found_inf:
            # The owner of `found_inf` reads it on another device.
            launches.append(partial(loss.found_inf.copy_, found, non_blocking=True))
        for stage, sweep in enumerate(kernels.sweeps):
            if stage:
                launches.append(
                    partial(
                        kernels.scalars[stage][(len(bucket),)],
                        addresses, tables.numel, tables.groups, tables.ids, sent, tables.first_chunk,
                        tables.partials, tables.work, tables.skip, tables.stride, LANES=LANES, enable_fp_fusion=True,
                    )
                )  # fmt: skip
            if tables.chunks and (program.passes[stage].elements or program.element_stores):
                launches.append(
                    partial(
                        sweep[(tables.chunks,)],
                        addresses, tables.numel, tables.chunk_tensor, tables.chunk_begin, tables.work,
                        tables.partials, tables.skip, tables.stride, CHUNK=CHUNK, BLOCK=BLOCK, **OPTIONS,
                    )
                )  # fmt: skip
        return launches

    def places(self, bucket: Bucket) -> tuple[int, ...]:
        """The identity and addresses that a recorded launch depends on: it may be replayed while these are the same."""
        tables = self._prepared(bucket)
        return id(bucket), tables.addresses.tensor.data_ptr(), tables.numbers.tensor.data_ptr()

    def _prepared(self, bucket: Bucket, program: Program | None = None) -> Tables:
        """The tables of a bucket and a Program, made when they are first seen."""
        program = program or bucket.update.program
        known = self._tables.setdefault(bucket, {})
        if (tables := known.get(program.fingerprint)) is not None:
            return tables
        kernels = self._built(program, bucket.layout)
        count, device = len(bucket), bucket.device
        chunk_tensor, chunk_begin, first_chunk = array("i"), array("q"), array("i", [0])
        for index, size in enumerate(bucket.sizes):
            begins = range(0, size, CHUNK)
            chunk_tensor.extend([index] * len(begins))
            chunk_begin.extend(begins)
            first_chunk.append(len(chunk_tensor))
        tables = Tables(
            stride=count + count % 2,
            chunks=len(chunk_tensor),
            numel=_sent(array("q", bucket.sizes), torch.int64, device),
            groups=_sent(bucket.groups, torch.int32, device),
            ids=_sent(bucket.ids, torch.int32, device),
            first_chunk=_sent(first_chunk, torch.int32, device),
            chunk_tensor=_sent(chunk_tensor, torch.int32, device),
            chunk_begin=_sent(chunk_begin, torch.int64, device),
            work=torch.zeros(count * kernels.width, dtype=torch.float64, device=device),
            partials=torch.zeros(max(len(chunk_tensor), 1) * kernels.reductions, dtype=torch.float64, device=device),
            skip=torch.zeros(1, dtype=torch.int32, device=device),
            never=torch.zeros(1, dtype=torch.int32, device=device),
            addresses=Mirror(torch.int64, device),
            numbers=Mirror(torch.float64, device),
        )
        known[program.fingerprint] = tables
        return tables


def _addresses(bucket: Bucket, stride: int) -> array[int]:
    """The addresses of a bucket's tensors and counters, in lines of ``stride``."""
    if bucket.addresses is None or (bucket.step_addresses is None) != (bucket.steps is None):
        raise ValueError("the triton engine needs the addresses of the bucket's tensors: see Bucket.locate()")
    words = bucket.addresses + (bucket.step_addresses or array("q"))
    count = len(bucket)
    if count == stride:
        return words
    padded = array("q")
    for start in range(0, len(words), count):
        padded.extend(words[start : start + count])
        padded.append(0)
    return padded


def _here(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """A tensor on the kernels' own device, since a GPU may be unable to read another's memory."""
    return None if tensor is None else tensor.to(device, non_blocking=True)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which ``device`` is the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
