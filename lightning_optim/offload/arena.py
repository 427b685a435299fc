"""Host memory in few, large slabs, pinned where it can be."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from lightning_optim.engines.memory import is_dense
from lightning_optim.warnings import warn_once

#: Each tensor of a slab begins at a multiple of these bytes: a cache line, so that threads at two tensors share none.
ALIGNMENT = 64


class Slab:
    """One piece of host memory that holds many tensors.

    It is pinned in place, not taken from torch's pinned allocator, which rounds to powers of two: 17 GB would become
    32. If pinning fails (by a limit on locked memory, say), the slab stays pageable, with a warning: copies are then
    slower, but correct.

    Args:
        dtype: The type of all its tensors.
        like: Tensors for each of which the slab has one, of the same shape and order in memory.
        pinned: Whether to pin it.

    Attributes:
        tensors: Views of it, in the order of ``like``.
        pinned: Whether it is pinned.
    """

    def __init__(self, dtype: torch.dtype, like: Sequence[Tensor], *, pinned: bool) -> None:
        step = max(1, ALIGNMENT // dtype.itemsize)
        begins, total = [], 0
        for tensor in like:
            begins.append(total)
            total += -(-tensor.numel() // step) * step
        # Zeros are written now, not at the first step; and in host memory, whatever `torch.set_default_device` says.
        self.memory = torch.zeros(total, dtype=dtype, device="cpu")
        self.tensors = [_view(self.memory, begin, tensor) for begin, tensor in zip(begins, like, strict=True)]
        self.pinned = pinned and total > 0 and self._pin()

    def _pin(self) -> bool:
        cudart = torch.cuda.cudart()
        address = self.memory.data_ptr()
        code = int(cudart.cudaHostRegister(address, self.memory.nbytes, 0))
        if code:
            warn_once(
                f"lightning-optim: {self.memory.nbytes / 1e9:.1f} GB of host memory could not be pinned (CUDA error "
                f"{code}); copies from it are slower. See `ulimit -l`",
                key="pinning failed",
            )
            return False
        # Unpin when the storage is freed: views of it, such as masters, outlive the tensor and the slab.
        weakref.finalize(self.memory.untyped_storage(), cudart.cudaHostUnregister, address)
        return True


def _view(memory: Tensor, begin: int, like: Tensor) -> Tensor:
    """A tensor in a slab, with the shape of another one, and with its order in memory if that is dense."""
    if is_dense(like):
        return memory.as_strided(like.shape, like.stride(), begin)
    return memory[begin : begin + prod(like.shape)].view(like.shape)
