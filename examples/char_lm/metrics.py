"""Bits per byte: how well a model compresses the text that it predicts."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class BitsPerByte(Metric):
    """Mean of ``-log2 p(byte)`` over all bytes seen, whatever the sizes of the batches they came in.

    Averaging the losses of batches would weigh the bytes of a small last batch more; this keeps the sum and
    the count, in float64, and adds both over processes. Smaller is better: 8 is a uniform guess, 0 is certainty.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    nats: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, nats: Tensor, count: int) -> None:
        """Add a batch.

        Args:
            nats: Sum of the cross entropy over the batch's bytes, in nats, as torch's losses are.
            count: How many bytes that were.
        """
        self.nats += nats.detach().double()
        self.count += count

    def compute(self) -> Tensor:
        """Bits per byte of all that was added since the last reset; a float64 scalar."""
        return self.nats / self.count / math.log(2)
