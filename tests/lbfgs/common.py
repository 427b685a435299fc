"""What the tests of L-BFGS share: problems, closures, and the two-loop recursion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Closure = Callable[[], Tensor]


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def start(n: int = 100, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    """(-1.2, 1, -1.2, 1, ...)"""
    x = torch.ones(n, dtype=dtype)
    x[::2] = -1.2
    return nn.Parameter(x)


class Problem:
    """A closure that counts, over parameters that ``loss`` reads."""

    def __init__(self, params: Iterable[nn.Parameter], loss: Callable[[], Tensor]) -> None:
        self.params, self.loss, self.calls = list(params), loss, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        for p in self.params:
            p.grad = None
        loss = self.loss()
        loss.backward()
        return loss


def regression(
    dtype: torch.dtype = torch.float64, shapes: Sequence[tuple[int, ...]] = ((5, 3), (4,), (), (0, 2))
) -> tuple[list[nn.Parameter], Problem]:
    """A smooth, convex function of several parameters, with its minimum away from 0."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]
    total = sum(p.numel() for p in params)
    matrix = torch.randn(2 * total, total, generator=generator, dtype=torch.float64).to(dtype)
    goal = torch.randn(2 * total, generator=generator, dtype=torch.float64).to(dtype)

    def loss() -> Tensor:
        residual = matrix @ torch.cat([p.reshape(-1) for p in params]) - goal
        return (1 + residual.square()).sqrt().mean()

    return params, Problem(params, loss)


def two_loop(gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """-Hg in float64 by Nocedal and Wright's algorithm 7.4."""
    q = gradient.double().clone()
    pairs = [(s.double(), y.double()) for s, y in pairs]
    alphas = []
    for s, y in reversed(pairs):
        alpha = (s @ q) / (s @ y)
        alphas.append(alpha)
        q -= alpha * y
    s, y = pairs[-1]
    q *= (s @ y) / (y @ y)
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        q += s * (alpha - (y @ q) / (s @ y))
    return -q


def values(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def state_copy(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state_dict that went through a file."""
    import io

    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)
