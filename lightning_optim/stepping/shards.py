"""Parameters that are divided over processes: DTensors, as FSDP2 and tensor parallelism make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: The dimensions of device meshes over which a tensor is divided, as ``(mesh, dimension)`` pairs: hashable.
Shards = tuple[tuple[Any, int], ...]

#: Sums of squares, by what the gradients are divided over.
LocalSquares = dict[Shards, list[Tensor]]


def is_distributed(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def same_parts(a: Tensor, b: Tensor) -> bool:
    """Whether two DTensors are divided alike, so that element-wise operations can be done part by part."""
    if not (is_distributed(a) and is_distributed(b)):
        return False
    placements = a.placements  # type: ignore[attr-defined] # of a DTensor
    alike = placements == b.placements and a.device_mesh == b.device_mesh  # type: ignore[attr-defined]
    return alike and not any(placement.is_partial() for placement in placements)


def shards_of(tensor: Tensor) -> Shards:
    """The mesh dimensions over which a DTensor is divided, without those over which it is replicated."""
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined] # of a DTensor
    # Not `is_shard()`: the strided shards of FSDP2 over tensor parallelism say no to it.
    return tuple((mesh, dim) for dim, placement in enumerate(placements) if not placement.is_replicate())


def all_reduced(total: Tensor, shards: Shards) -> Tensor:
    """The sum of ``total`` over all parts: one number per mesh dimension crosses the network."""
    for mesh, dim in shards:
        torch.distributed.all_reduce(total, group=mesh.get_group(dim))
    return total


def totals(local: Mapping[Shards, Sequence[Tensor]]) -> Tensor:
    """The sums over all processes, on the first tensor's device.

    Args:
        local: This process's sums, by what its tensors are divided over; one 1-dim tensor for each bucket. Not empty.
    """
    sums = []
    for where, parts in local.items():
        device = parts[0].device
        sums.append(all_reduced(torch.stack([part.to(device, non_blocking=True) for part in parts]).sum(0), where))
    return torch.stack([part.to(sums[0].device, non_blocking=True) for part in sums]).sum(0)


def total_squares(local: LocalSquares) -> Tensor:
    """The sum of squares over all processes, in parts, on the first tensor's device.

    Args:
        local: This process's sums; not empty.
    """
    parts: list[Tensor] = []
    for where, sums in local.items():
        if where:
            parts.append(all_reduced(torch.stack([part.sum() for part in sums]).sum(), where).reshape(1))
        else:
            parts += sums
    first = parts[0].device
    return parts[0] if len(parts) == 1 else torch.cat([part.to(first, non_blocking=True) for part in parts])
