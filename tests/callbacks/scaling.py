"""What the tests of ``LossScaling`` share: trainings, and the loop that they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from strategies.common import (
    OPTIMIZERS,
    Model,
    dataset,
    fit,
    known_warnings,
    network,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_optim.callbacks import LossScaling

marks = [
    *known_warnings,
    pytest.mark.usefixtures("one_thread"),
    # On purpose: first steps that are skipped under Lightning's own scaling, and checkpoints in the middle of an epoch.
    pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU"),
]

STRATEGIES = ["auto", "in_graph", "detached"]
#: As many as a scale that is much too large at first, and grows often, makes of eight batches.
SETTINGS: dict[str, Any] = {"init_scale": 256.0, "growth_interval": 2, "max_scale": 512.0}
OVERFLOWS = {2, 3, 6}
GradScaler = torch.amp.GradScaler
Hook = Callable[[nn.Module], None]


def half(scaler: Any = None) -> MixedPrecision:
    """``16-mixed`` on the CPU, with the scaler that the Trainer's flag gives on CUDA."""
    return MixedPrecision("16-mixed", "cpu", scaler)


def train(model: Any, strategy: Any = "auto", callback: Any = None, **options: Any) -> tuple[Any, Any]:
    """A fit with the callback."""
    callbacks = [*options.pop("callbacks", []), LossScaling(**SETTINGS) if callback is None else callback]
    return fit(model, strategy, plugins=[options.pop("plugin", None) or half()], callbacks=callbacks, **options)


class Scaled(Model):
    """Some batches overflow."""

    def __init__(self, make: Any = None) -> None:
        super().__init__(make or OPTIMIZERS["torch AdamW"])
        self.overflows = OVERFLOWS


class Noted:
    """What a loop noted, as the tests' fits do."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.lrs: list[float] = []
        self.scales: list[float] = []


def by_hand(
    make: Any,
    clip: float | None = None,
    accumulate: int = 1,
    after_backward: Hook | None = None,
    before_step: Hook | None = None,
) -> Noted:
    """The loop of torch's documentation, with a schedule that waits, and with bounds."""
    net, noted = network(), Noted()
    optimizer = make(net.parameters())
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    scaler = GradScaler("cpu", init_scale=SETTINGS["init_scale"], growth_interval=SETTINGS["growth_interval"])
    x, y = dataset().tensors
    for batch in range(8):
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            part = slice(2 * batch, 2 * batch + 2)
            loss = nn.functional.mse_loss(net(x[part]).to(y.dtype), y[part])
            loss = loss * 1e30 if batch in OVERFLOWS else loss
        scaler.scale(loss / accumulate).backward()
        if after_backward is not None:
            after_backward(net)
        if (batch + 1) % accumulate == 0:
            scaler.unscale_(optimizer)
            if before_step is not None:
                before_step(net)
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= before:
                schedule.step()
            if scaler.get_scale() > SETTINGS["max_scale"]:
                scaler.update(SETTINGS["max_scale"])
            optimizer.zero_grad()
        noted.weights.append({f"net.{name}": p.detach().clone() for name, p in net.named_parameters()})
        noted.lrs.append(optimizer.param_groups[0]["lr"])
        noted.scales.append(scaler.get_scale())
    return noted


def states(run: Any) -> dict[str, Any]:
    state: dict[str, Any] = run.precision_plugin.state_dict()
    return state


class Manual(Scaled):
    """Two optimizers, of which the second comes first, and overflows; schedules that the module advances."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for which in (1, 0):
            optimizer = self.optimizers()[which]
            optimizer.zero_grad()
            x, y = batch
            loss = nn.functional.mse_loss(self.net(x).to(y.dtype), y)
            self.manual_backward(loss * 1e30 if which and batch_idx in self.overflows else loss)
            optimizer.step()
            if not self.trainer.precision_plugin.scaler.step_was_skipped(optimizer.optimizer):
                self.lr_schedulers()[which].step()

    def configure_optimizers(self) -> Any:
        halves = [self.net[0].parameters(), self.net[3].parameters()]
        optimizers = [self.make(params) for params in halves]
        return optimizers, [LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in optimizers]
