"""Which parameters are the same memory: weights tied through ``.data`` are one variable in several objects."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_optim.engines.memory import is_plain, overlap, overlaps_itself


def owners(name: str, params: Sequence[Tensor]) -> list[int]:
    """For each parameter, the index of the first one that is the very same memory: usually its own.

    Args:
        name: The optimizer's name, for messages.
        params: Parameters with elements, not divided over processes.

    Raises:
        ValueError: Two of them share memory only in part, or two elements of one are one place in memory.

    >>> import torch
    >>> weight = torch.zeros(3)
    >>> owners("LBFGS", [weight, torch.nn.Parameter(weight.data), torch.zeros(3)])
    [0, 0, 2]
    """
    first: dict[object, int] = {}
    found = [first.setdefault(_place(p, number), number) for number, p in enumerate(params)]
    repeated = [i for i in first.values() if overlaps_itself(params[i])]
    if repeated:
        raise ValueError(
            f"{name}: parameter {repeated[0]}, of shape {tuple(params[repeated[0]].shape)}, has elements that are one "
            "place in memory; valid: a contiguous copy of it"
        )
    placed = [number for number in first.values() if _has_place(params[number])]
    if (shared := overlap([params[number] for number in placed])) is not None:
        number, earlier = placed[shared[0]], ", ".join(str(placed[other]) for other in shared[1])
        raise ValueError(
            f"{name}: parameter {number}, of shape {tuple(params[number].shape)}, shares memory in part with one of "
            f"parameters {earlier}; valid: parameters that are the same memory, or have none in common"
        )
    return found


def _has_place(p: Tensor) -> bool:
    return is_plain(p) and p.device.type != "meta"


def _place(p: Tensor, number: int) -> object:
    if not _has_place(p):
        return number
    return p.data_ptr(), p.device, p.dtype, p.shape, p.stride(), p.is_neg(), p.is_conj()
