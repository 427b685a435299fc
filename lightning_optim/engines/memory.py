"""How tensors lie in memory, which decides whether a list of them can be updated as flat arrays."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

_PLAIN = frozenset({Tensor, torch.nn.Parameter})


@dataclass(frozen=True)
class Reading:
    """Where tensors are, and what they are.

    Attributes:
        addresses: The addresses of their first elements.
        forms: Equal to those of another reading only if the tensors have the same types, devices, shapes and strides,
            are lazily negated or conjugated alike, are made in inference mode alike, and lie within their storages if
            the others do.
    """

    addresses: array[int]
    forms: Any


#: The properties that :func:`read` asks for, one after the other of all tensors, which is three times as fast.
_KINDS = (
    attrgetter("dtype"),
    attrgetter("device"),
    attrgetter("shape"),
    Tensor.stride,
    Tensor.is_neg,
    Tensor.is_conj,
    Tensor.is_inference,
    Tensor.storage_offset,
)


def read(tensors: Sequence[Tensor]) -> Reading:
    """A reading of torch's own tensors.

    Raises:
        RuntimeError: One of them is of another class.
    """
    if not set(map(type, tensors)) <= _PLAIN:
        raise RuntimeError(f"of {set(map(type, tensors))}, not all are torch's own tensors")
    addresses = array("q", map(Tensor.data_ptr, tensors))
    sizes = list(map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors)))
    return Reading(addresses, [sizes, *(list(map(kind, tensors)) for kind in _KINDS)])


def read_any(tensors: Sequence[Tensor]) -> Reading:
    """A reading of tensors of any class and on any device; the address of a tensor without one is 0."""
    divided = [(getattr(t, "placements", None), getattr(t, "device_mesh", None)) for t in tensors]
    addresses = array("q", [t.data_ptr() if is_plain(t) else 0 for t in tensors])
    return Reading(addresses, [list(map(form, tensors)), list(map(type, tensors)), divided])


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


def form(tensor: Tensor) -> tuple[Any, ...]:
    """All that decides how a tensor is updated, apart from its address and its values."""
    signs = tensor.is_neg(), tensor.is_conj(), tensor.is_inference()
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, *signs


def is_lazy(tensor: Tensor) -> bool:
    """Whether memory holds other numbers than the tensor's values: their negatives, or conjugates."""
    return tensor.is_neg() or tensor.is_conj()


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is torch's own, so that its memory is at its address."""
    return type(tensor) in _PLAIN


def has_address(tensor: Tensor) -> bool:
    """Whether the tensor is torch's own, on a device where memory has addresses."""
    return is_plain(tensor) and tensor.device.type in ("cpu", "cuda") and tensor.layout == torch.strided


def in_order_of(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` itself, or a copy whose memory holds its true values in the order of ``like``'s elements.

    A lazily negated tensor (autograd makes such gradients from conjugates) holds in memory the negatives of its values.

    Raises:
        RuntimeError: The two differ in shape.
    """
    if tensor.shape != like.shape:
        raise RuntimeError(f"shapes {tuple(tensor.shape)} and {tuple(like.shape)} differ")  # copying would broadcast
    if same_order(tensor, like) and not is_lazy(tensor):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype, memory_format=torch.preserve_format).copy_(tensor)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory (an expanded tensor's do), so that they cannot be written one by one."""
    steps = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    if not tensor.numel() or (steps and steps[0][0] == 0):
        return tensor.numel() > 0
    reach = 0  # the largest distance between elements that differ only in dimensions of smaller strides
    for stride, size in steps:
        if stride <= reach:  # they interleave
            offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
            for step, count in steps:
                offsets = (offsets + step * torch.arange(count, device="cpu")[:, None]).flatten()
            return offsets.unique().numel() < tensor.numel()
        reach += (size - 1) * stride
    return False


def problem_of_storage(tensor: Tensor) -> str | None:
    """Why a tensor's elements do not all lie within its storage, or None if they do."""
    if not tensor.numel():
        return None
    size = tensor.untyped_storage().nbytes()
    needed = tensor.storage_offset() * tensor.element_size() + extent(tensor)
    if needed <= size:
        return None
    return f"its storage has been resized to {size} bytes, and it needs {needed}"


def extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last, including gaps."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def spans(tensors: Sequence[Tensor]) -> tuple[array[int], array[int]]:
    """The addresses and the extents of tensors; both are 0 for a tensor without an address."""
    known = [(t.data_ptr(), extent(t)) if has_address(t) else (0, 0) for t in tensors]
    return array("q", [begin for begin, _ in known]), array("q", [length for _, length in known])


def aliased(tensors: Sequence[Tensor]) -> bool:
    """Whether two tensors share memory (weights tied through ``.data``, overlapping views of one buffer)."""
    return ranges(*spans(tensors)) is None


def overlap(tensors: Sequence[Tensor]) -> tuple[int, list[int]] | None:
    """The index of a tensor that shares a byte with another one, and the indices of the candidates; None if none does.

    Ranges may meet although no byte is shared (the columns of one matrix interleave, say), so single bytes are marked.
    """
    placed = sorted((t.data_ptr(), number) for number, t in enumerate(tensors) if t.numel() and has_address(t))
    groups: list[list[int]] = []
    end = 0
    for begin, number in placed:
        if begin >= end:
            groups.append([])
        groups[-1].append(number)
        end = max(end, begin + extent(tensors[number]))
    return next((found for numbers in groups if numbers[1:] and (found := _taken_twice(tensors, numbers))), None)


def _taken_twice(tensors: Sequence[Tensor], numbers: Sequence[int]) -> tuple[int, list[int]] | None:
    first = min(tensors[number].data_ptr() for number in numbers)
    end = max(tensors[number].data_ptr() + extent(tensors[number]) for number in numbers)
    taken = torch.zeros(end - first, dtype=torch.bool, device="cpu")
    earlier: list[int] = []
    for number in sorted(numbers):
        t = tensors[number]
        size = t.element_size()  # tensors in one piece of memory may have several types
        own = taken.as_strided((*t.shape, size), (*(step * size for step in t.stride()), 1), t.data_ptr() - first)
        if own.any():
            return number, earlier
        own.fill_(True)
        earlier.append(number)
    return None


@dataclass(frozen=True)
class Ranges:
    """Disjoint ranges of memory.

    Attributes:
        bounds: The begin and end of each range, in order.
    """

    bounds: array[int]

    def meet(self, begins: Sequence[int], lengths: Sequence[int]) -> bool:
        """Whether one of these other ranges overlaps one of ours."""
        bounds = self.bounds
        for begin, length in zip(begins, lengths, strict=True):
            place = bisect_right(bounds, begin)
            if length and (place % 2 or (place < len(bounds) and bounds[place] < begin + length)):
                return True
        return False


def ranges(begins: Sequence[int], lengths: Sequence[int]) -> Ranges | None:
    """These ranges in order; None if two of them overlap."""
    found = sorted((begin, begin + length) for begin, length in zip(begins, lengths, strict=True) if length)
    if any(end > begin for (_, end), (begin, _) in pairwise(found)):
        return None
    return Ranges(array("q", chain.from_iterable(found)))
