"""Taking a step back: where a step keeps what it overwrites."""

from __future__ import annotations

from torch import Tensor

from lightning_optim.engines.memory import is_dense
from lightning_optim.rules.policy import UNDO


class UndoBuffers:
    """For each weight and slot, memory of the same form that a step writes the old value to, as it goes.

    The bits come back, whatever happened in between. (An update is never inverted by algebra: after a spike of 1e4
    that makes variances negative.) Buffers are made when they are first needed, and kept.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Tensor, str], Tensor] = {}

    def buffer(self, p: Tensor, name: str, like: Tensor) -> Tensor:
        """Where the old value of tensor ``name`` of parameter ``p`` goes.

        Args:
            p: The parameter.
            name: ``"p"`` or a slot.
            like: The tensor.
        """
        key = (p, name)
        found = self._buffers.get(key)
        if found is None or not _fits(found, like):
            found = self._buffers[key] = like.detach().clone()  # unlike `empty_like` it keeps every order in memory
        return found

    def give_back(self, p: Tensor, name: str, tensor: Tensor) -> None:
        """Put the old value of tensor ``name`` of parameter ``p`` back."""
        tensor.copy_(self._buffers[p, name])


def _fits(found: Tensor, like: Tensor) -> bool:
    if (found.shape, found.dtype, found.device) != (like.shape, like.dtype, like.device):
        return False
    return found.stride() == like.stride() or not is_dense(like)  # which no copy has the order of


def undo_name(name: str) -> str:
    """The name, in a Program, of the tensor that gets the old value of tensor ``name``."""
    return UNDO + name
