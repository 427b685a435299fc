"""The training task: predict the next byte, report bits per byte.

The module says nothing about optimizers. They are chosen by configuration: see ``config.yaml``.
"""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional

from examples.char_lm.data import Batch
from examples.char_lm.metrics import BitsPerByte
from examples.char_lm.model import GPT


class CharLM(LightningModule):
    """A byte-level language model.

    Args:
        layers: Transformer blocks.
        width: Channels of the residual stream.
        heads: Attention heads; they divide the width.
        context: The longest window that the model reads, in bytes.
        dropout: Dropout probability.
    """

    def __init__(
        self, layers: int = 4, width: int = 128, heads: int = 4, context: int = 128, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = GPT(layers, width, heads, context, dropout)
        self.val_bpb = BitsPerByte()
        self.test_bpb = BitsPerByte()

    def forward(self, bytes_in: Tensor) -> Tensor:
        """Logits of the next byte at each position: (batch, time) to (batch, time, 256)."""
        return self.model(bytes_in)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Mean cross entropy in nats; logged in bits."""
        bytes_in, targets = batch
        loss = functional.cross_entropy(self(bytes_in).flatten(0, 1), targets.flatten())
        self.log("train_bpb", loss.detach() / math.log(2), prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add a batch to ``val_bpb``."""
        self._evaluate(batch, self.val_bpb)
        self.log("val_bpb", self.val_bpb, on_epoch=True, prog_bar=True)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Add a batch to ``test_bpb``."""
        self._evaluate(batch, self.test_bpb)
        self.log("test_bpb", self.test_bpb, on_epoch=True)

    def _evaluate(self, batch: Batch, metric: BitsPerByte) -> None:
        bytes_in, targets = batch
        nats = functional.cross_entropy(self(bytes_in).flatten(0, 1), targets.flatten(), reduction="sum")
        metric.update(nats, targets.numel())
