"""The base class of engines, the buckets that they run, and the record of why one was chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optim.engines.host.reader import native_reader
from lightning_optim.engines.memory import Reading, is_lazy, is_plain, read
from lightning_optim.engines.progress import Progress, Write
from lightning_optim.engines.scaling import Scaling
from lightning_optim.rules import counting
from lightning_optim.rules.interpret import interpret_results
from lightning_optim.rules.policy import Update
from lightning_optim.rules.program import Program
from lightning_optim.rules.table import wide, widest

#: Per-tensor scalars, which the bucket itself provides; all others come from the table, one line per param group.
TENSOR_SCALARS = ("step", "tensor_id")

Scalars = Mapping[str, "float | Tensor"]


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which weights of a storage type are computed: float64 for float64's own, float32 for all others."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Layout:
    """The storage types of one bucket's tensors, by name, and the type in which the math is done.

    Attributes:
        math: ``torch.float32``, or ``torch.float64`` when the weights are float64.
        dtypes: ``(tensor name, dtype)`` pairs in the order of the calling convention.
    """

    math: torch.dtype
    dtypes: tuple[tuple[str, torch.dtype], ...]


@dataclass(eq=False)  # buckets are compared by identity: engines may keep what they have prepared for one
class Bucket:
    """Tensors that one Program updates: same rule, policy, flags, device and storage types.

    Attributes:
        update: The rule with its policy.
        layout: The storage types.
        device: Where all the tensors are.
        tensors: For each tensor name of the calling convention, one tensor per parameter.
        steps: One 0-dim float32 counter per parameter, where the engine wants it (see
            :attr:`Engine.controls_on_device`), or None if the update does not read it. The engine advances them
            when it has updated all of the bucket.
        groups: For each parameter, its group number, which is also the number of its line in the table of scalars.
        ids: For each parameter, its stable number in the optimizer: the seed of its rounding noise.
        sizes: For each parameter, its number of elements.
        plain: Whether all tensors but the weights are torch's own (engines look at the weights themselves).
        dense: Whether each parameter's tensors fill the same memory order without gaps, so that they can be
            treated as flat arrays.
        aliased: Whether two tensors that are written share memory, or one of them shares it with a gradient. Then the
            parameters are read and written one after the other.
        label: The bucket in words, for reports.
        addresses: For engines that use them, the address of each tensor, field after field in the order of the
            calling convention; read anew at every step.
        step_addresses: Likewise, the address of each counter.
        progress: How far the current step has come. A step that has begun to write must be finished:
            :meth:`Engine.run` goes on from there. None: every run is a new step.
    """

    update: Update
    layout: Layout
    device: torch.device
    tensors: dict[str, list[Tensor]]
    steps: list[Tensor] | None
    groups: array[int]
    ids: array[int]
    sizes: tuple[int, ...]
    plain: bool = True
    dense: bool = True
    aliased: bool = False
    label: str = ""
    addresses: array[int] | None = None
    step_addresses: array[int] | None = None
    progress: Progress | None = None

    def __len__(self) -> int:
        return len(self.groups)

    def locate(self) -> None:
        """Read the addresses of the tensors and counters."""
        self.addresses = array("q")
        for name in self.update.program.tensors:
            self.addresses.extend(map(Tensor.data_ptr, self.tensors[name]))
        self.step_addresses = None if self.steps is None else array("q", map(Tensor.data_ptr, self.steps))

    def scalars(self, index: int, table: Sequence[Scalars]) -> dict[str, float | Tensor]:
        """All scalars of parameter ``index``; ``step`` is that of the coming step, the counter is not advanced."""
        values = dict(table[self.groups[index]])
        values["tensor_id"] = float(self.ids[index])
        if self.steps is not None:
            values["step"] = counting.next_step(self.steps[index].item())
        return values


@dataclass
class Decision:
    """Which engine runs a bucket, and why the others do not.

    Attributes:
        bucket: What is run, in words.
        engine: The name of the engine chosen.
        reason: Why it was chosen.
        rejected: For each engine that was considered before it, the reason against it.
    """

    bucket: str
    engine: str
    reason: str
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.bucket}: {self.engine} ({self.reason})"
        return text + "".join(f"\n  not {name}: {reason}" for name, reason in self.rejected.items())


class Engine(ABC):
    """Runs an update over buckets. Stateless but for caches of compiled code.

    Attributes:
        name: As users write it in ``engine=``.
        uses_addresses: Whether buckets must carry the addresses of their tensors.
        controls_on_device: Whether counters are kept on the weights' device (otherwise on the CPU), and whether
            unscaling, clipping and leaving a step out are decided there, by :meth:`run` itself.
    """

    name: ClassVar[str]
    uses_addresses: ClassVar[bool] = False
    controls_on_device: ClassVar[bool] = False

    def unavailable(self) -> str | None:
        """Why this engine cannot run at all on this machine, or None if it can."""
        return None

    def rejects(self, bucket: Bucket) -> str | None:
        """Why this engine cannot run ``bucket``, or None if it can; may compile."""
        return None

    def read(self, tensors: list[Tensor]) -> Reading:
        """A reading of torch's own tensors; it is compared from step to step to see whether a plan still holds.

        Raises:
            RuntimeError, TypeError, AttributeError: One of them is not a tensor of torch's own, or has no strides, or
                its storage has become too small for it.
        """
        return (native_reader() or read)(tensors)

    @abstractmethod
    def run(self, bucket: Bucket, table: Sequence[Scalars], scaling: Scaling | None = None) -> None:
        """Advance the counters and update the weights and the state of ``bucket`` in place.

        A run that fails before it has written anything leaves everything as it was. After a later failure, a second
        call with the same ``bucket.progress`` goes on where the first one stopped.

        Args:
            bucket: What to update. Gradients are only read.
            table: The scalars of each param group; ``bucket.groups`` points into it.
            scaling: For engines whose ``controls_on_device`` is set: determines the scalar ``grad_scale``, and
                whether the step is left out. For all others the table has ``grad_scale`` already.
        """

    @torch.no_grad()
    def reduce(
        self, bucket: Bucket, program: Program, table: Sequence[Scalars], scaling: Scaling | None = None
    ) -> Tensor:
        """The results of a Program, added up over the bucket's parameters: 1-dim float64, on their device.

        Args:
            bucket: The bucket with the tensors.
            program: A Program without stores. Its ``step`` is the coming step; counters are not advanced.
            table: As in :meth:`run`.
            scaling: As in :meth:`run`.
        """
        math = bucket.layout.math
        sums: list[list[Tensor]] = []
        for index in range(len(bucket)):
            loaded = {name: bucket.tensors[name][index].to(math) for name in program.loads}
            values = interpret_results(program, loaded, bucket.scalars(index, table), math)
            sums.append([_as_number(value, bucket.device) for value in values])
        return torch.stack([torch.stack(column).sum() for column in zip(*sums, strict=True)])

    def sum_of_squares(self, bucket: Bucket) -> Tensor:
        """The sum of squares of the bucket's gradients, in one or more parts: 1-dim float64 on their device."""
        tensors = bucket.tensors["g"]
        if bucket.device.type == "cpu" or not bucket.plain:
            # Not `_foreach_norm(dtype=float64)`, which is right but not vectorized on the CPU (11 ns an element).
            norms = [torch.linalg.vector_norm(t.double()) for t in tensors]
            return torch.stack([getattr(norm, "full_tensor", lambda norm=norm: norm)() for norm in norms]).square()
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square()


def _as_number(value: float | Tensor, device: torch.device) -> Tensor:
    """A result as a 0-dim tensor in the type of scalars; a DTensor gives the result over all its shards."""
    if isinstance(value, Tensor):
        return wide(getattr(value, "full_tensor", lambda: value)()).reshape(())
    return torch.tensor(value, dtype=widest(device), device=device)


def advance(bucket: Bucket) -> list[Write]:
    """The calls that advance the step counters of the bucket by one."""
    return counting.advancing(bucket.steps) if bucket.steps else []


def flat_memory(bucket: Bucket, dtypes: Container[torch.dtype]) -> str | None:
    """Why a bucket cannot be updated as flat arrays at the addresses of its tensors, or None if it can.

    Args:
        bucket: The bucket.
        dtypes: The storage types that the engine knows.
    """
    for name, dtype in bucket.layout.dtypes:
        if dtype not in dtypes:
            return f"{name} is stored as {dtype}"
    for tensor in bucket.tensors["p"]:
        if not is_plain(tensor):
            return f"{type(tensor).__name__} weights need torch's own operators"
    if not bucket.plain:
        return "gradients or slots of other types than Tensor need torch's own operators"
    if not bucket.dense:
        return "the weights have gaps or overlaps in memory"
    return in_place(bucket)


def in_place(bucket: Bucket) -> str | None:
    """Why the tensors of a bucket cannot be written all at once, or None if they can."""
    if any(map(is_lazy, bucket.tensors["p"])):
        return "lazily negated weights need torch's own operators"
    if bucket.aliased:
        return "two weights share memory, or slots or gradients do, so that updates must follow one another"
    return None
