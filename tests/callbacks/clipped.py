"""What the tests of ``GradientClipping`` share: modules, and their training in plain PyTorch."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from control.clipping_references import WAYS
from strategies.common import OPTIMIZERS, Model, dataset, network, scaled
from strategies.common import known_warnings as of_all
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optim.callbacks import GradientClipping

known_warnings = [
    *of_all,
    # Of steps that a loss scaler skips, under Lightning's own strategies.
    pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step"),
]

STRATEGIES = ["auto", "in_graph", "detached", "optim_auto"]
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]
EACH_WAY = pytest.mark.parametrize("way", WAYS)
EACH_STRATEGY = pytest.mark.parametrize("strategy", STRATEGIES)


class Manual(Model):
    """Steps by itself, after every ``accumulate`` batches."""

    def __init__(self, make: Any = None, accumulate: int = 1, clip: float = 0.0) -> None:
        super().__init__(make)
        self.automatic_optimization, self.accumulate, self.clip = False, accumulate, clip

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx) / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            optimizer = self.optimizers()
            if self.clip:
                self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


class Noted:
    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.lrs: list[float] = []


@cache
def by_hand(way: str, precision: str = "32-true", accumulate: int = 1, name: str = "torch AdamW") -> Noted:
    """The training of ``Model`` in plain PyTorch; weights and learning rates after every batch."""
    net, noted = network(), Noted()
    optimizer = OPTIMIZERS[name](net.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "16-mixed")
    clip = WAYS[way][1]()
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.half}.get(precision)
    for number, (x, y) in enumerate(DataLoader(dataset(), batch_size=2)):
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            loss = nn.functional.mse_loss(net(x).to(y.dtype), y)
        scaler.scale(loss / accumulate).backward()
        if (number + 1) % accumulate == 0:
            scaler.unscale_(optimizer)
            clip(list(net.parameters()))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()
        noted.weights.append({f"net.{key}": p.detach().clone() for key, p in net.named_parameters()})
        noted.lrs.append(optimizer.param_groups[0]["lr"])
    return noted


def clipping(way: str, **options: Any) -> Any:
    return GradientClipping(**WAYS[way][0], **options)


def in_precision(precision: str) -> dict[str, Any]:
    return {"plugins": [scaled()]} if precision == "16-mixed" else {"precision": precision}
