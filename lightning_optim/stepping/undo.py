"""Undo buffers, in which a step keeps the values that it overwrites."""

from __future__ import annotations

from torch import Tensor

from lightning_optim.engines.memory import is_dense
from lightning_optim.rules.policy import UNDO


class UndoBuffers:
    """For each weight and slot, a buffer of the same form to which a step writes the old value.

    An undo restores every bit. (It never inverts an update by algebra, which would make variances negative after a
    spike of 1e4.) Buffers are made when they are first needed, and kept.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Tensor, str], Tensor] = {}

    def buffer(self, p: Tensor, name: str, like: Tensor) -> Tensor:
        """The buffer for the old value of tensor ``name`` of parameter ``p``.

        Args:
            p: The parameter.
            name: ``"p"`` or a slot.
            like: The tensor whose form the buffer has.
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
    return found.stride() == like.stride() or not is_dense(like)  # no copy has the strides of a tensor with gaps


def undo_name(name: str) -> str:
    """The name, in a Program, of the tensor that gets the old value of tensor ``name``."""
    return UNDO + name
