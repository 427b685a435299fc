"""Which parameters are the same memory: weights tied through ``.data`` are one variable, whatever objects there are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.engines.memory import aliased, is_plain


def owners(name: str, params: Sequence[Tensor]) -> list[int]:
    """For each parameter, the number of the first one that is the very same memory: mostly its own.

    Args:
        name: Of the optimizer, for messages.
        params: Parameters with elements, not divided over processes.

    Raises:
        ValueError: Two of them share memory only in part, or two elements of one are one place in memory.

    >>> weight = torch.zeros(3)
    >>> owners("LBFGS", [weight, torch.nn.Parameter(weight.data), torch.zeros(3)])
    [0, 0, 2]
    """
    first: dict[object, int] = {}
    found = [first.setdefault(_place(p, number), number) for number, p in enumerate(params)]
    expanded = [i for i in first.values() if _repeats(params[i])]
    if expanded:
        raise ValueError(
            f"{name}: parameter {expanded[0]}, of shape {tuple(params[expanded[0]].shape)}, has elements that are one "
            "place in memory; valid: a contiguous copy of it"
        )
    placed = [number for number in first.values() if _has_place(params[number])]
    if aliased([params[number] for number in placed]):
        _refuse_overlaps(name, params, placed)
    return found


def _has_place(p: Tensor) -> bool:
    return is_plain(p) and p.device.type != "meta"


def _place(p: Tensor, number: int) -> object:
    if not _has_place(p):
        return number
    return p.data_ptr(), p.device, p.dtype, p.shape, p.stride(), p.is_neg(), p.is_conj()


def _repeats(p: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True))


def _refuse_overlaps(name: str, params: Sequence[Tensor], numbers: Sequence[int]) -> None:
    """Count: the columns of one matrix, say, lie between each other, and do not overlap."""
    seen: dict[int, tuple[Tensor, list[int]]] = {}
    for number in numbers:
        p = params[number].detach()
        storage = p.untyped_storage()
        if storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = torch.zeros(storage.nbytes(), dtype=torch.bool, device="cpu"), []
        taken, earlier = seen[storage.data_ptr()]
        size = p.element_size()
        where = [stride * size for stride in p.stride()]
        # In bytes: views of one storage may be of types of several sizes.
        bytes_of = taken.as_strided((*p.shape, size), (*where, 1), p.storage_offset() * size)
        if bytes_of.any():
            raise ValueError(
                f"{name}: parameter {number}, of shape {tuple(p.shape)}, shares memory in part with one of parameters "
                f"{', '.join(map(str, earlier))}; valid: parameters that are the same memory, or have none in common"
            )
        bytes_of.fill_(True)
        earlier.append(number)
