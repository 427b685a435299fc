"""Small tensors of a device, read by the host one step late, so that the device's queue never runs dry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LateReader:
    """Reads one tensor at each step: on CUDA that of the step before, when the next step has been launched.

    The delay is fixed, so that processes that train together learn of the same thing at the same step. Tensors of other
    devices are read at once.

    Example:
        >>> reader = LateReader()
        >>> reader.read(torch.tensor(3), "the first step")
        [(tensor(3), 'the first step')]
    """

    def __init__(self) -> None:
        self._awaited: tuple[Tensor, Any, Any] | None = None

    def read(self, tensor: Tensor, about: Any = None) -> list[tuple[Tensor, Any]]:
        """Hand in the tensor of this step, and get what has arrived: none, or one.

        Args:
            tensor: The tensor; on CUDA it is copied, and may change afterwards.
            about: Anything that is to come back with it.

        Returns:
            Pairs of a tensor on the host and what it is about.
        """
        if tensor.device.type != "cuda":
            return [(tensor, about)]
        before = self._awaited
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        copy.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(tensor.device))
        self._awaited = (copy, arrived, about)
        if before is None:
            return []
        copy, arrived, about = before
        arrived.synchronize()
        return [(copy, about)]

    def forget(self) -> None:
        """Forget what has not arrived."""
        self._awaited = None
