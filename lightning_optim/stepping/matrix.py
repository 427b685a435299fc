"""Steps of the matrix kind: element-wise Programs around products of whole matrices.

A step of matrices is three: a Program that turns gradients into directions and writes these where matrices of one shape
lie side by side; their orthogonalization, a batch at a time; and a Program that moves the weights. All other parameters
have an element-wise rule of their own, in the same step, under the same clipping and loss scale.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_optim.engines.base import Decision
from lightning_optim.engines.memory import is_dense
from lightning_optim.engines.newton_schulz import MUON, Triple, orthogonalize, polar_express
from lightning_optim.engines.scaling import LossScale, Scaling
from lightning_optim.optimizers.adam import ADAM
from lightning_optim.optimizers.adamw import AdamWOptim
from lightning_optim.rules.policy import Decay
from lightning_optim.rules.rule import Rule
from lightning_optim.stepping.method import Group, Inputs, Method, Options, Owner
from lightning_optim.stepping.plan import Planner
from lightning_optim.stepping.shards import LocalSquares, is_distributed, local, same_parts
from lightning_optim.stepping.split_groups import follow
from lightning_optim.stepping.stepper import Stepper
from lightning_optim.stepping.undo import UndoBuffers
from lightning_optim.warnings import warn_once


def move(p: Any, g: Any, *, lr: Any) -> Any:
    """The rule by which a weight follows a direction."""
    return lr * g


class _Move:
    """The rule by which matrices are moved, as a Method."""

    rule = Rule(move)

    def __init__(self, method: Method) -> None:
        self.method = method

    def public_name(self) -> str:
        return f"{self.method.public_name()}'s moves"

    def flags(self, group: Group, p: Tensor, fresh: bool) -> dict[str, bool]:
        return {}

    def decay(self, group: Group) -> Decay:
        return self.method.decay(group)

    def scalars(self, group: Group) -> dict[str, float | Tensor]:
        return self.method.scalars(group)


class _Rest(_Move):
    """The rule of all that are no matrices, as a Method."""

    rule = ADAM

    def public_name(self) -> str:
        return f"{self.method.public_name()}'s AdamW"

    def flags(self, group: Group, p: Tensor, fresh: bool) -> dict[str, bool]:
        return {"amsgrad": False}

    def scalars(self, group: Group) -> dict[str, float | Tensor]:
        return AdamWOptim.scalars(group)


class Kind(NamedTuple):
    """What the matrices of a batch have in common.

    Attributes:
        rows, columns: Their shape, as they lie in memory.
        dtype: What they are stored in.
        device: Where.
        coefficients: Of each Newton–Schulz step; the last have the size of the update in them.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device
    coefficients: tuple[Triple, ...]


@dataclass
class Batch:
    """Matrices of one kind.

    Attributes:
        kind: What they have in common.
        weights: The parameters, with the number of matrices that each is.
        directions: Of all of them, one after the other.
        staged: The parameters whose directions must be copied there, by their place among ``weights``.
    """

    kind: Kind
    weights: list[tuple[Tensor, int]] = field(default_factory=list)
    directions: Tensor | None = None
    staged: dict[int, Tensor] = field(default_factory=dict)


def matrices(shape: torch.Size, stacked: bool) -> tuple[int, int, int]:
    """As how many matrices, of how many rows and columns, a weight of two or more dimensions is stepped."""
    if len(shape) == 3 and stacked:
        return shape[0], shape[1], shape[2]
    return 1, shape[0], math.prod(shape[1:])


def coefficients_of(group: Group, rows: int, columns: int) -> tuple[Triple, ...]:
    """The polynomials of a group's Newton–Schulz steps, the last times the size of the update."""
    steps = int(group["ns_steps"])
    schedule = (MUON,) * steps if group["ns_coefficients"] == "muon" else polar_express(steps)
    size = max(1.0, rows / columns) ** 0.5 if group["adjust_lr"] == "original" else 0.2 * max(rows, columns) ** 0.5
    a, b, c = schedule[-1]
    return (*schedule[:-1], (size * a, size * b, size * c))


class MatrixStepper(Stepper):
    """Steps the groups whose ``use_muon`` is set as matrices, and the others by AdamW.

    Args:
        owner: Has ``param_groups`` and ``state``.
        method: The rule of a matrix's direction, and how a param group's options map to its inputs.
        options: What holds for all groups.
    """

    def __init__(self, owner: Owner, method: Method, options: Options) -> None:
        super().__init__(owner, _Rest(method), options, selects=lambda group: not group["use_muon"])
        self._direct = Stepper(owner, method, options, part="direction", selects=lambda group: group["use_muon"])
        self._move = Stepper(owner, _Move(method), options, part="move", selects=lambda group: group["use_muon"])
        self._has_rest = self._has_matrices = self._is_moving = False
        self._batches: list[Batch] = []
        self._updates: dict[Tensor, Tensor] = {}
        self._copies: Mapping[Tensor, Tensor] | None = None

    def plan(
        self,
        grads: Mapping[Tensor, Tensor] | None = None,
        copies: Mapping[Tensor, Tensor] | None = None,
        *,
        inputs: Inputs | None = None,
        scaled: bool = False,
        undo: UndoBuffers | None = None,
    ) -> bool:
        """See :meth:`Stepper.plan`; such a step cannot be taken back."""
        if undo is not None:
            raise ValueError(
                f"the step of {self._direct.planner.method.public_name()} cannot be taken back; valid: undo=None"
            )
        follow(self.owner.param_groups)
        self._direct._progress = self._move._progress = []
        self._has_rest = super().plan(grads, copies, inputs=inputs, scaled=scaled)
        given, directions = self._lay_out(grads)
        self._has_matrices = self._direct.plan(given, directions, scaled=scaled)
        self._copies = copies
        return self._has_rest or self._has_matrices

    def local_squares(self) -> LocalSquares:
        """See :meth:`Stepper.local_squares`: of both kinds."""
        sums = super().local_squares() if self._has_rest else {}
        for where, parts in (self._direct.local_squares() if self._has_matrices else {}).items():
            sums.setdefault(where, []).extend(parts)
        return sums

    def abandon(self) -> None:
        """See :meth:`Stepper.abandon`."""
        super().abandon()
        self._direct.abandon()
        self._move.abandon()

    @property
    def has_written(self) -> bool:
        """See :meth:`Stepper.has_written`."""
        return super().has_written or self._direct.has_written

    @property
    def _has_begun(self) -> bool:
        return super()._has_begun or self._direct._has_begun

    def _start(self, scaling: Scaling | None) -> None:
        self.scaling, self._is_moving = scaling, False
        if self._has_rest:
            super()._start(scaling)
        if self._has_matrices:
            self._lend_counters()
            self._direct._start(scaling)

    def _go_on(self) -> None:
        if self._has_rest:
            super()._go_on()
        if not self._has_matrices:
            return
        self._direct._go_on()
        if self._direct._skip:
            return
        for batch in self._batches:
            if batch.directions is not None:
                self._orthogonalize(batch)
        if not self._is_moving:
            self._move.plan(self._updates, self._copies)
            self._move._start(self._decided())
            self._is_moving = True
        self._move._go_on()

    def _decided(self) -> Scaling | None:
        """What tells moves that are decided on the device whether the step is left out, as the kernels before said."""
        if self.scaling is None or self.scaling.loss is None:
            return None
        if not all(planned.engine.controls_on_device for planned in self._direct._plan):
            return None
        return Scaling(None, LossScale(None, self.scaling.loss.found_inf, check=False))

    def _end(self) -> None:
        for stepper in (self._direct, self._move):
            stepper._end()
        super()._end()
        self._batches, self._updates, self._copies = [], {}, None  # memory is held during a step only

    def _let_go(self) -> None:
        super()._let_go()
        self._direct._let_go()
        self._move._let_go()

    def planner_of(self, group: Group) -> Planner:
        """See :meth:`Stepper.planner_of`."""
        return self._direct.planner if group["use_muon"] else self.planner

    def number_parameters(self, numbers: Sequence[int]) -> None:
        """See :meth:`Stepper.number_parameters`."""
        for planner in (self.planner, self._direct.planner, self._move.planner):
            planner.numbers = numbers

    def report(self, *, scaled: bool = False) -> list[Decision]:
        """See :meth:`Stepper.report`."""
        return [*self._direct.report(scaled=scaled), *self._move.report(), *super().report(scaled=scaled)]

    def _can_capture(self, grads: Mapping[Tensor, Tensor] | None) -> bool:
        warn_once(
            f"lightning-optim: the step of {self._direct.planner.method.public_name()} is not captured as a CUDA graph "
            "(matrices are orthogonalized between its kernels)",
            key="capture: matrices",
        )
        return False

    def _lend_counters(self) -> None:
        """Where both Programs of a parameter count the step, let the first count copies."""
        for planned in self._direct._plan:
            bucket = planned.bucket
            if bucket.steps and bucket.update.policy.rounds:
                bucket.steps = list(torch.stack(bucket.steps).unbind())
                if planned.engine.uses_addresses:
                    bucket.step_addresses = array("q", map(Tensor.data_ptr, bucket.steps))

    def _lay_out(self, grads: Mapping[Tensor, Tensor] | None) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """Batches for all matrices with a gradient; their gradients, and where their directions are written."""
        self._updates = {}
        given: dict[Tensor, Tensor] = {}
        directions: dict[Tensor, Tensor] = {}
        batches: dict[Kind, Batch] = {}
        known: dict[tuple[int, int, int], tuple[Triple, ...]] = {}
        for number, group in enumerate(self.owner.param_groups):
            if not group["use_muon"]:
                continue
            for p in group["params"]:
                g = p.grad if grads is None else grads.get(p)
                if g is None:
                    continue
                given[p] = _as_weight(g, p)
                dtype = _batch_dtype(p)
                if not p.numel() or p.ndim < 2:
                    directions[p] = torch.empty_like(local(p), dtype=dtype, requires_grad=False)
                    self._updates[p] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
                    continue
                count, rows, columns = matrices(p.shape, group["stacked"])
                if (number, rows, columns) not in known:
                    known[number, rows, columns] = coefficients_of(group, rows, columns)
                coefficients = known[number, rows, columns]
                if _lies_transposed(p):
                    rows, columns = columns, rows  # the transpose's polar factor is the transpose of the polar factor
                kind = Kind(rows, columns, dtype, p.device, coefficients)
                batches.setdefault(kind, Batch(kind)).weights.append((p, count))
        self._batches = list(batches.values())
        for batch in self._batches:
            directions.update(_allocate(batch))
        return given, directions

    def _orthogonalize(self, batch: Batch) -> None:
        assert batch.directions is not None  # noqa: S101
        parts = batch.directions.split([count for _, count in batch.weights])
        for place, direction in batch.staged.items():
            parts[place].copy_(_gathered(direction, batch.weights[place][0]).reshape(parts[place].shape))
        schedule = batch.kind.coefficients
        result = orthogonalize(batch.directions, steps=len(schedule), coefficients=schedule)
        parts = result.split([count for _, count in batch.weights])
        for place, ((p, _), part) in enumerate(zip(batch.weights, parts, strict=True)):
            self._updates[p] = _scattered(part.view(p.shape), p) if place in batch.staged else _like(part, p)
        batch.directions = None


def _batch_dtype(p: Tensor) -> torch.dtype:
    """What :func:`orthogonalize` multiplies in."""
    if p.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if p.is_cuda else torch.float32


def _allocate(batch: Batch) -> dict[Tensor, Tensor]:
    """Memory for a batch, and where in it each parameter's direction goes."""
    kind, total = batch.kind, sum(count for _, count in batch.weights)
    batch.directions = torch.empty(total, kind.rows, kind.columns, dtype=kind.dtype, device=kind.device)
    places: dict[Tensor, Tensor] = {}
    parts = batch.directions.split([count for _, count in batch.weights])
    for place, (p, count) in enumerate(batch.weights):
        if _is_matrix_in_memory(p, count):
            places[p] = _like(parts[place], p)
        else:
            places[p] = torch.empty_like(local(p), dtype=kind.dtype, requires_grad=False)
            batch.staged[place] = places[p]
    return places


def _lies_transposed(p: Tensor) -> bool:
    """Whether a weight's first dimension is the innermost in memory, and it is one matrix."""
    return not is_distributed(p) and p.ndim == 2 and not p.is_contiguous() and p.t().is_contiguous()


def _is_matrix_in_memory(p: Tensor, count: int) -> bool:
    """Whether a weight's memory, read in order, is a matrix with the same singular vectors up to their order.

    Transposed it is one, and so it is with the columns in another order, as in a convolution's kernel that lies
    ``channels_last``.
    """
    if is_distributed(p) or not is_dense(p):
        return False
    if p.is_contiguous() or _lies_transposed(p):
        return True
    outermost = max(stride for stride, size in zip(p.stride(), p.shape, strict=True) if size > 1)
    return count == 1 and p.shape[0] > 1 and p.stride(0) == outermost


def _like(part: Tensor, p: Tensor) -> Tensor:
    """A view of a part of a batch with a weight's shape and order in memory."""
    if p.is_contiguous():
        return part.view(p.shape)
    return part.as_strided(p.shape, p.stride(), part.storage_offset())


def _as_weight(g: Tensor, p: Tensor) -> Tensor:
    """A gradient divided over processes as its weight is."""
    if is_distributed(p) and is_distributed(g) and not same_parts(p, g):
        return g.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined] # of a DTensor
    return g


def _gathered(direction: Tensor, p: Tensor) -> Tensor:
    """The whole of a direction, from all processes that have a part of it."""
    if not is_distributed(p):
        return direction
    from torch.distributed.tensor import DTensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined] # of a DTensor
    whole = DTensor.from_local(direction, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())
    return whole.full_tensor()


def _scattered(update: Tensor, p: Tensor) -> Tensor:
    """This process's part of an update that all of them have."""
    if not is_distributed(p):
        return update
    from torch.distributed.tensor import DTensor, Replicate

    mesh = p.device_mesh  # type: ignore[attr-defined] # of a DTensor
    whole = DTensor.from_local(update, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=p.placements)  # type: ignore[attr-defined] # of a DTensor
