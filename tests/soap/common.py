"""What these tests share: weights of all kinds, their gradients, and optimizers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim.engines import ENGINES

ENGINES_HERE = [name for name, engine in ENGINES.items() if engine.unavailable() is None]
each_engine = pytest.mark.parametrize("engine", ENGINES_HERE)

#: Several of one shape, a vector, a number, matrices of one column, kernels of convolutions, and nothing at all.
SHAPES: tuple[tuple[int, ...], ...] = (
    (5, 3),
    (5, 3),
    (3,),
    (),
    (3, 1),
    (4, 4),
    (4, 3, 2, 2),
    (2, 3, 4),
    (0, 3),
    (5, 3),
)


def normal(shape: Sequence[int], *key: int, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(hash(key) % 2**31)
    return torch.randn(list(shape), generator=random, dtype=torch.float64).to(dtype)


def weights(shapes: Iterable[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(normal(shape, index, dtype=dtype)) for index, shape in enumerate(shapes)]


def give_gradients(params: Iterable[Tensor], step: int) -> None:
    for index, p in enumerate(params):
        p.grad = normal(p.shape, 100 + index, step, dtype=p.dtype)


def train(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: Iterable[int]) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def contents(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    """A copy of all that a step may change."""
    return [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())


def same(a: Any, b: Any) -> bool:
    """Whether two contents are the same, to the bit."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=7.5), b.nan_to_num(nan=7.5))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
