"""What the tests of range tests share: a model whose steps change all that steps may change, and what a run leaves."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from strategies.common import fit, model_class
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optim
from lightning_optim.callbacks import LRFinder

#: Few steps, and a range whose curve falls: the tests are about what is put back, unless they say so.
QUICK: dict[str, Any] = {"min_lr": 1e-4, "max_lr": 1.0, "steps": 10}


def data(samples: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(samples, 6, generator=generator)
    return TensorDataset(x, x.sin().sum(dim=1, keepdim=True))


def falling(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, _factor)


def _factor(step: int) -> float:
    return 1 / (1 + step / 10)


class Restless(model_class()):  # type: ignore[misc]
    """Batch norm, dropout, every generator of random numbers, attributes, a metric, logged values, a second network."""

    def __init__(self, make: Callable[..., Any] | None = None, **loader: Any) -> None:
        super().__init__(make or partial(lightning_optim.AdamW, lr=0.01))
        import torchmetrics

        torch.manual_seed(3)
        self.net: Any = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1))
        self.teacher = nn.Linear(6, 1).requires_grad_(False)
        self.metric = torchmetrics.MeanMetric()
        self.seen, self.noted = 0, {"last": torch.zeros(())}
        self.history: list[float] = []
        self.loader = {"batch_size": 4, "shuffle": True} | loader
        self.schedule: Any = falling

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))  # noqa: S311
        loss = nn.functional.mse_loss(self.net(x).to(y.dtype), y + 0.01 * noise)
        self.seen += 1
        self.history.append(float(loss.detach()))
        self.noted["last"] = self.noted["last"] * 0.5 + loss.detach().float()
        with torch.no_grad():
            self.teacher.weight.lerp_(self.net[0].weight[:1].float(), 0.1)
        self.metric(loss.detach().float())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(), **self.loader)

    def configure_optimizers(self) -> Any:
        biases = [p for p in self.net.parameters() if p.ndim == 1]
        weights = [p for p in self.net.parameters() if p.ndim > 1]
        optimizer = self.make([{"params": weights}, {"params": biases, "lr": 0.002, "weight_decay": 0.0}])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


def run(model: Any, strategy: Any = "auto", finder: LRFinder | None = None, **options: Any) -> tuple[Any, Any]:
    """A fit from a known state of all generators."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    callbacks = options.pop("callbacks", [])
    return fit(model, strategy, callbacks=[*callbacks, *([] if finder is None else [finder])], **options)


def left_behind(trainer: Any, noted: Any) -> dict[str, Any]:
    """All that a run leaves: trajectories, states, counters, generators, metrics."""
    model = trainer.lightning_module
    loops = trainer.fit_loop.state_dict()
    return {
        "trajectory": noted.weights,
        "lrs": noted.lrs,
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "precision": trainer.precision_plugin.state_dict(),
        "attributes": (model.seen, list(model.history), model.noted["last"]),
        "metrics": dict(trainer.callback_metrics),
        "loops": loops,
        "noise": (random.random(), float(np.random.rand()), torch.rand(3)),  # noqa: S311
    }


def assert_identical(found: Any, expected: Any, where: str = "") -> None:
    """Equal in every bit, and in type."""
    assert type(found) is type(expected), where
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), where
        for key in found:
            assert_identical(found[key], expected[key], f"{where}/{key}")
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected), where
        for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert_identical(ours, theirs, f"{where}/{index}")
    elif isinstance(found, Tensor):
        assert torch.equal(found, expected), where
    elif not callable(found):
        assert found == expected, where
