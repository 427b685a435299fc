"""How tensors lie in memory: what decides whether a list of them can be updated as flat arrays."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """Where tensors are, and what they are.

    Attributes:
        addresses: Of their first elements, for engines that use them.
        forms: Equal to that of another reading if and only if the tensors have the same types, devices, shapes and
            strides.
    """

    addresses: array[int]
    forms: Any


def read_forms(tensors: Sequence[Tensor]) -> Reading:
    """A reading without addresses, for tensors of any class."""
    kinds = (attrgetter("dtype"), attrgetter("device"), attrgetter("shape"), Tensor.stride)
    return Reading(array("q"), [list(map(kind, tensors)) for kind in kinds])


def read(tensors: Sequence[Tensor]) -> Reading:
    """A reading of torch's own tensors."""
    return Reading(array("q", map(Tensor.data_ptr, tensors)), read_forms(tensors).forms)


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


def is_lazy(tensor: Tensor) -> bool:
    """Whether memory holds other numbers than the tensor's values: their negatives, or conjugates."""
    return tensor.is_neg() or tensor.is_conj()


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is torch's own, so that its memory is at its address."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def in_order_of(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` itself, or a copy of it whose elements lie in memory as ``like``'s do, and as they are.

    A lazily negated tensor (autograd makes such gradients from conjugates) holds in memory the negatives of its values.

    Raises:
        RuntimeError: They differ in shape.
    """
    if tensor.shape != like.shape:
        raise RuntimeError(f"shapes {tuple(tensor.shape)} and {tuple(like.shape)} differ")  # copying would broadcast
    if same_order(tensor, like) and not is_lazy(tensor):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype, memory_format=torch.preserve_format).copy_(tensor)


def aliased(tensors: Sequence[Tensor]) -> bool:
    """Whether two tensors share memory (weights tied through ``.data``, overlapping views of one buffer)."""
    ranges = sorted((t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors if t.numel())
    return any(end > begin for (_, end), (begin, _) in pairwise(ranges))


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last; all that lie between count, also in gaps."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
