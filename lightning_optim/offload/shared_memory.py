"""Weights that share memory, which are not one parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.engines.memory import aliased


def check_memory(weights: Sequence[Tensor]) -> None:
    """Refuse weights that share memory: each would have a master of its own, and the last to arrive would win.

    Args:
        weights: All of them.

    Raises:
        ValueError: Two of them, or two elements of one, have a place in memory in common.
    """
    tensors = [p.detach() for p in weights if p.numel()]
    if not aliased(tensors) and not any(_repeats(p) for p in tensors):
        return
    # The columns of one matrix, say, are no overlap, though they lie between each other: count.
    by_storage: dict[int, list[Tensor]] = {}
    for p in tensors:
        by_storage.setdefault(p.untyped_storage().data_ptr(), []).append(p)
    for same in by_storage.values():
        if (aliased(same) or any(map(_repeats, same))) and _overlap(same):
            shapes = " and ".join(str(tuple(p.shape)) for p in same[:3])
            raise ValueError(
                f"detached: weights of shapes {shapes} share memory, and each would be updated without the others; "
                "valid: tie weights by giving both modules the same Parameter"
            )


def _repeats(p: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True))


def _overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether any element of one storage is in two of its views."""
    sizes = {p.element_size() for p in tensors}
    if len(sizes) > 1 or any(map(_repeats, tensors)):
        return True
    seen = torch.zeros(tensors[0].untyped_storage().nbytes() // sizes.pop(), dtype=torch.bool, device="cpu")
    for p in tensors:
        own = seen.as_strided(p.shape, p.stride(), p.storage_offset())
        if own.any():
            return True
        own.fill_(True)
    return int(seen.sum()) < sum(p.numel() for p in tensors)
