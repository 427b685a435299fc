"""What the tests of loss scalers share: a plain loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.control.late import LateReader

Scaler = torch.amp.GradScaler
#: Which batches overflow, out of twelve.
SOME = {3, 4, 9}
ALL = set(range(100))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Linear(2, 1))


def overflow_in(parameter: Tensor, *at: int) -> Callable[[int], None]:
    """A hook that makes a gradient infinite in some batches."""
    now = [0]

    def hook(gradient: Tensor) -> Tensor:
        return gradient * math.inf if now[0] in at else gradient

    parameter.register_hook(hook)
    return lambda batch: now.__setitem__(0, batch)


def train(
    scaler: Scaler,
    steps: int = 12,
    overflows: set[int] = SOME,
    net: nn.Module | None = None,
    make: Any = torch.optim.AdamW,
) -> Iterator[tuple[float, list[Tensor]]]:
    """A plain loop, as torch's documentation has it; gives the scale and the weights after each step."""
    net = network() if net is None else net
    optimizer = make(net.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        loss = net(torch.randn(5, 3, generator=generator)).square().mean()
        scaler.scale(loss * (math.nan if step in overflows else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        yield scaler.get_scale(), [p.detach().clone() for p in net.parameters()]


def scales(scaler: Scaler, steps: int = 12, overflows: set[int] = SOME) -> list[float]:
    return [scale for scale, _ in train(scaler, steps, overflows)]


def repeat(scaler: Scaler, net: nn.Module, loss_of: Callable[[int], Tensor], steps: int, window: int = 1) -> None:
    """A loop over losses that are given."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        for _ in range(window):
            scaler.scale(loss_of(step)).backward()
        scaler.step(optimizer)
        scaler.update()


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


class KnownLate(LateReader):
    """On the CPU the host knows all at once; this reader tells it as on CUDA, one step late."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[Any] = []

    def read(self, tensor: Tensor, about: Any = None) -> list[Any]:
        before, self.before = self.before, [(tensor.clone(), about)]
        return before
