"""Skipped steps, counted on the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.control.late import LateReader
from lightning_optim.control.overflow import BackwardWatch, parameters_of


class SkippedSteps:
    """The skipped steps of one optimizer, counted where their flags are.

    Args:
        consecutive: Those in a row up to now.
        total: All of them.

    Attributes:
        counts: Both numbers, as a tensor.
        consecutive: Those in a row as far as the host knows.
        watch: What watches the backward pass, if it is watched.
    """

    def __init__(self, consecutive: int = 0, total: int = 0) -> None:
        self.counts = torch.tensor([consecutive, total], dtype=torch.int64, device="cpu")
        self.consecutive = consecutive
        self.watch: BackwardWatch | None = None
        self._reader = LateReader()

    def add(self, found_inf: Tensor) -> None:
        """Count a step, where its flag is."""
        skipped = found_inf.reshape(()) != 0
        self.counts = self.counts.to(skipped.device, non_blocking=True)
        self.counts += skipped
        self.counts[0] *= skipped

    def known(self) -> int:
        """The skipped steps in a row as far as the host knows, without waiting."""
        for counts, _ in self._reader.read(self.counts):
            self.consecutive, _ = counts.tolist()
        return self.consecutive

    def read(self) -> tuple[int, int]:
        """The skipped steps in a row, and all skipped steps."""
        self.consecutive, total = self.counts.tolist()
        return self.consecutive, total

    def restart(self) -> None:
        """Begin a new row."""
        self.counts[0] = self.consecutive = 0
        self._reader.forget()
        self.watch_if(False, None)

    def watch_if(self, watched: bool, optimizer: Optimizer | None) -> None:
        """Watch the next backward pass, or do not."""
        if watched and optimizer is not None:
            if self.watch is None:
                self.watch = BackwardWatch(parameters_of(optimizer))
            self.watch.clear()
        elif self.watch is not None:
            self.watch.remove()
            self.watch = None
