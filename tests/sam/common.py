"""What the tests of SAM share: a small problem, and the perturbation written out in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim.optimizers.sam import SAM

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "ours": partial(lightning_optim.AdamW, lr=0.05, weight_decay=0.1),
    "muon": partial(lightning_optim.Muon, lr=0.02, adamw_lr=0.05, adamw_patterns=[]),
    "torch AdamW": partial(torch.optim.AdamW, lr=0.05),
    # Which has a `rho` of its own.
    "torch Adadelta": partial(torch.optim.Adadelta, lr=0.5, rho=0.8),
    "torch SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5
    return net.to(dtype)


def loss_of(net: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    p = next(net.parameters())
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64).to(p.dtype)
    return net(x).square().mean()


def closure_of(optimizer: torch.optim.Optimizer, net: nn.Module, step: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, step)
        loss.backward()
        return loss

    return closure


def perturbation(
    params: Sequence[Tensor], grads: Sequence[Tensor], rhos: Sequence[float], sizes: Sequence[Tensor | float]
) -> list[Tensor]:
    """e = rho T² g / ‖T g‖, in float64."""
    scaled = [g.double() * t for g, t in zip(grads, sizes, strict=True)]
    norm = torch.stack([s.square().sum() for s in scaled]).sum().sqrt() + 1e-12
    return [rho * t * s / norm for rho, t, s in zip(rhos, sizes, scaled, strict=True)]


def train_by_hand(net: nn.Module, base: torch.optim.Optimizer, rho: float, steps: range) -> None:
    """SAM as a plain loop around the base."""
    params = list(net.parameters())
    for step in steps:
        base.zero_grad()
        loss_of(net, step).backward()
        moves = perturbation(params, [p.grad for p in params if p.grad is not None], [rho] * len(params), [1.0] * 6)
        old = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, move in zip(params, moves, strict=True):
                p.add_(move)
        base.zero_grad()
        loss_of(net, step).backward()
        with torch.no_grad():
            for p, before in zip(params, old, strict=True):
                p.copy_(before)
        base.step()


def train(net: nn.Module, optimizer: SAM, steps: range) -> None:
    for step in steps:
        optimizer.step(closure_of(optimizer, net, step))


def weights(net: nn.Module) -> list[Any]:
    return [p.detach().clone() for p in net.parameters()]
