"""Batches, in which matrices of one shape lie side by side during a step, and the way into them and back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_optim.engines.memory import is_dense
from lightning_optim.rules.matrix import Stack
from lightning_optim.stepping.shards import is_distributed, local, same_parts


class Kind(NamedTuple):
    """What the matrices of a batch have in common.

    Attributes:
        shape: The shape of each, as it lies in memory.
        dtype: The type that the transform computes in.
        device: Their device.
        constants: What the transform depends on.
        due: Whether this step renews their state.
        begins: Whether this step only makes their first state.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    constants: Hashable
    due: bool = False
    begins: bool = False


@dataclass
class Batch:
    """Matrices of one kind.

    Attributes:
        kind: What they have in common.
        any_order: Whether matrices may be transposed, or have their columns in another order.
        weights: The parameters, each with the number of matrices that it is.
        directions: The directions of all of them, one after the other.
        staged: Directions that must be copied into ``directions``, by their parameter's place among ``weights``.
        given: The directions before the transform, if they are needed again.
        stack: What the transform knows; None before the transform.
    """

    kind: Kind
    any_order: bool
    weights: list[tuple[Tensor, int]] = field(default_factory=list)
    directions: Tensor | None = None
    staged: dict[int, Tensor] = field(default_factory=dict)
    given: Tensor | None = None
    stack: Stack | None = None

    @property
    def count(self) -> int:
        """How many matrices there are."""
        return sum(count for _, count in self.weights)

    def room_for(self, count: int, most: int | None) -> bool:
        """Whether ``count`` more matrices fit, if a stack of several may have at most ``most`` elements."""
        if most is None or not self.weights:
            return True
        size = count + self.count
        for side in self.kind.shape:
            size *= side
        return size <= most

    def allocate(self) -> dict[Tensor, Tensor]:
        """Allocate memory for the directions; returns where each parameter's direction is to be written."""
        kind = self.kind
        self.directions = torch.empty(self.count, *kind.shape, dtype=kind.dtype, device=kind.device)
        self.staged = {}
        places: dict[Tensor, Tensor] = {}
        for place, ((p, count), part) in enumerate(zip(self.weights, self.parts(self.directions), strict=True)):
            if _is_matrix_in_memory(p, count, self.any_order):
                places[p] = _like(part, p)
            else:
                places[p] = torch.empty_like(local(p), dtype=kind.dtype, requires_grad=False)
                self.staged[place] = places[p]
        return places

    def collected(self) -> Tensor:
        """The directions, after those of sharded weights, or of weights in another memory order, are copied in."""
        assert self.directions is not None  # noqa: S101
        parts = self.parts(self.directions)
        for place, direction in self.staged.items():
            parts[place].copy_(_gathered(direction, self.weights[place][0]).reshape(parts[place].shape))
        return self.directions

    def divided(self, x: Tensor) -> dict[Tensor, Tensor]:
        """The transformed directions by parameter, each with its parameter's shape and sharding."""
        return {
            p: _scattered(part.reshape(p.shape), p) if place in self.staged else _like(part, p)
            for place, ((p, _), part) in enumerate(zip(self.weights, self.parts(x), strict=True))
        }

    def stacked(self, slot: str, state: Mapping[Tensor, Mapping[str, Tensor]]) -> Tensor:
        """The values of a slot for all matrices, in the type of the matrices."""
        values = []
        for p, count in self.weights:
            value = _whole(state[p][slot]).to(self.kind.dtype)
            if value.shape == p.shape:
                value = value.reshape(count, *self.kind.shape)
            elif p.ndim != len(self.kind.shape) + 1:  # else it is one for each matrix of a stack already
                value = value.unsqueeze(0)
            values.append(value)
        return values[0] if len(values) == 1 else torch.cat(values)

    def let_go(self) -> None:
        """Free the directions."""
        self.directions = self.given = None

    def parts(self, x: Tensor) -> list[Tensor]:
        """Each parameter's part of a batch, in the order of ``weights``."""
        return list(x.split([count for _, count in self.weights]))


def lies_transposed(p: Tensor) -> bool:
    """Whether a weight is one matrix whose transpose is contiguous in memory."""
    return not is_distributed(p) and p.ndim == 2 and not p.is_contiguous() and p.t().is_contiguous()


def as_weight(g: Tensor, p: Tensor) -> Tensor:
    """A gradient with the sharding of its weight."""
    if is_distributed(p) and is_distributed(g) and not same_parts(p, g):
        return g.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined] # of a DTensor
    return g


def as_slot(value: Tensor, slot: Tensor) -> Tensor:
    """A slot's new value, which every process has as a whole, with the slot's shape and sharding."""
    return _scattered(value.reshape(slot.shape), slot) if is_distributed(slot) else value.reshape(slot.shape)


def _is_matrix_in_memory(p: Tensor, count: int, any_order: bool) -> bool:
    """Whether a weight's memory, read in order, is a matrix that can be transformed in the weight's place.

    If the order does not matter, that matrix may be the transpose, or have its columns in another order, as for a
    convolution's kernel in ``channels_last``: the singular vectors are the same up to their order.
    """
    if is_distributed(p) or not is_dense(p):
        return False
    if p.is_contiguous():
        return True
    if not any_order:
        return False
    if lies_transposed(p):
        return True
    outermost = max(stride for stride, size in zip(p.stride(), p.shape, strict=True) if size > 1)
    return count == 1 and p.shape[0] > 1 and p.stride(0) == outermost


def _like(part: Tensor, p: Tensor) -> Tensor:
    """A view of a part of a batch with a weight's shape and order in memory."""
    if p.is_contiguous():
        return part.view(p.shape)
    return part.as_strided(p.shape, p.stride(), part.storage_offset())


def _whole(slot: Tensor) -> Tensor:
    return slot.full_tensor() if is_distributed(slot) else slot  # type: ignore[attr-defined] # of a DTensor


def _gathered(direction: Tensor, p: Tensor) -> Tensor:
    """A whole direction, gathered from all processes that have a part of it."""
    if not is_distributed(p):
        return direction
    from torch.distributed.tensor import DTensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined] # of a DTensor
    whole = DTensor.from_local(direction, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())
    return whole.full_tensor()


def _scattered(update: Tensor, p: Tensor) -> Tensor:
    """An update that all processes have as a whole, with the sharding of its parameter."""
    if not is_distributed(p):
        return update
    from torch.distributed.tensor import DTensor, Replicate

    mesh = p.device_mesh  # type: ignore[attr-defined] # of a DTensor
    whole = DTensor.from_local(update, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=p.placements)  # type: ignore[attr-defined] # of a DTensor
