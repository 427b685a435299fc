"""What these tests share: matrices of all kinds, their gradients, and optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import Muon
from lightning_optim.engines import ENGINES

each_engine = pytest.mark.parametrize("engine", [name for name, e in ENGINES.items() if e.unavailable() is None])

#: Wide, tall, several of one shape, a convolution's kernel, and a stack.
SHAPES: tuple[tuple[int, ...], ...] = ((5, 9), (9, 5), (9, 5), (7, 7), (4, 2, 3, 3), (3, 4, 6), (9, 5))


def normal(shape: Sequence[int], *key: int, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(hash(key) % 2**31)
    return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)


def weights(shapes: Iterable[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(normal(shape, index, dtype=dtype)) for index, shape in enumerate(shapes)]


def give_gradients(params: Iterable[Tensor], step: int) -> None:
    for index, p in enumerate(params):
        p.grad = normal(p.shape, 100 + index, step, dtype=p.dtype)


def muon(params: Iterable[Any], **options: Any) -> Muon:
    """A Muon whose parameters are all matrices."""
    return Muon([{"params": list(params), "use_muon": True}], **options)


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: Iterable[int]) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def named_groups(optimizer: torch.optim.Optimizer) -> list[tuple[bool, list[str]]]:
    return [(group["use_muon"], group["param_names"]) for group in optimizer.param_groups]
