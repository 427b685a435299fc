"""What the tests of ``GradientAccumulation`` share: ragged batches, a model for them, and the loop by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from strategies.common import CLOSE, Model, known_warnings, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_optim
import lightning_optim.strategies  # makes the names known

expected_warnings = [
    *known_warnings,
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*an epoch has . batches, and a window"),
    pytest.mark.filterwarnings("ignore:.*Detected call of .lr_scheduler.step"),  # after a window that overflowed
]

STRATEGIES = ["auto", "in_graph", "detached", "optim_auto"]
SGD = partial(torch.optim.SGD, lr=0.05)


def ragged(count: int = 8) -> list[dict[str, Any]]:
    """Batches of 1 to 7 tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = [1 + 3 * (i % 3) for i in range(count)]
    inputs = [torch.randn(n, 6, generator=generator) for n in tokens]
    return [{"x": x, "y": 3 * x.sin().sum(dim=1, keepdim=True), "tokens": len(x)} for x in inputs]


class Stream(IterableDataset[Any]):
    """Batches whose number is not known."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class Ragged(Model):
    """Trains on ragged batches, and notes what its steps are like."""

    def __init__(self, make: Any = SGD, count: int = 8, stream: bool = False) -> None:
        super().__init__(make)
        self.count, self.stream = count, stream
        self.estimated: Any = None
        self.skipped: set[int] = set()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        if batch_idx in self.skipped:
            return None
        loss = loss_of(self.net, batch)
        return loss * 1e30 if batch_idx in self.overflows else loss

    def train_dataloader(self) -> DataLoader[Any]:
        data = ragged(self.count)
        return DataLoader(Stream(data) if self.stream else data, batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        self.estimated = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


def loss_of(net: nn.Module, batch: dict[str, Any]) -> Tensor:
    return nn.functional.mse_loss(net(batch["x"]).float(), batch["y"])


def by_hand(
    windows: list[list[dict[str, Any]]],
    make: Any = SGD,
    *,
    weighted: bool,
    clip: float | None = None,
    cast: Any = None,
    decays: bool = True,
) -> list[dict[str, Tensor]]:
    """The weights after each step of a plain loop; weighted: over whole windows as one batch."""
    net = network()
    optimizer = make(net.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    steps = []
    for window in windows:
        if weighted:
            window = [{key: torch.cat([batch[key] for batch in window]) for key in ("x", "y")}]
        for batch in window:
            with torch.autocast("cpu", cast, enabled=cast is not None):
                loss = loss_of(net, batch)
            (loss / len(window)).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        if decays:
            schedule.step()
        optimizer.zero_grad()
        steps.append({f"net.{name}": p.detach().clone() for name, p in net.named_parameters()})
    return steps


def divided(batches: list[Any], *lengths: int) -> list[list[Any]]:
    assert sum(lengths) == len(batches)
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return [batches[a:b] for a, b in itertools.pairwise(ends)]


def assert_steps(noted: Any, expected: list[dict[str, Tensor]], **tolerance: Any) -> None:
    """The weights after each step, of those that were noted after each batch."""
    steps = [noted.weights[0]]
    for weights in noted.weights[1:]:
        if not all(torch.equal(weights[name], steps[-1][name]) for name in weights):
            steps.append(weights)
    initial = {f"net.{name}": p for name, p in network().named_parameters()}
    if all(torch.equal(steps[0][name], p) for name, p in initial.items()):
        steps = steps[1:]
    assert len(steps) == len(expected)
    for found, other in zip(steps, expected, strict=True):
        for name, value in other.items():
            torch.testing.assert_close(found[name], value, **tolerance or CLOSE)


def sam(params: Any) -> Any:
    return lightning_optim.SAM(params, partial(lightning_optim.SGD, lr=0.05), rho=0.1)


def lbfgs(params: Any) -> Any:
    return torch.optim.LBFGS(params)
