"""How tensors lie in memory: what decides whether a list of them can be updated as flat arrays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a range of memory, each address once (contiguous, channels_last, transposed)."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors of one shape have their elements in the same order in memory."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def form(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]:
    """All that decides how a tensor is updated, apart from where it is and what is in it."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def in_order_of(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` itself, or a copy of it whose elements lie as ``like``'s do."""
    if same_order(tensor, like):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype, memory_format=torch.preserve_format).copy_(tensor)


def aliased(tensors: Sequence[Tensor]) -> bool:
    """Whether two non-empty tensors begin at the same address (weights tied through ``.data``)."""
    addresses = [t.data_ptr() for t in tensors if t.numel()]
    return len(set(addresses)) < len(addresses)
