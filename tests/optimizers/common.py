"""What the tests of the optimizers share: how they make one, train it and compare what it has."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import optimizer_info
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS

# Without a C compiler the host engine says so and another one takes its place, "with the same results": that is
# what these tests then find out.
known_warnings = pytest.mark.filterwarnings(
    "ignore:.*the host engine cannot be used .no C compiler:lightning_optim.warnings.LightningOptimWarning"
)

each = pytest.mark.parametrize("name", sorted(OPTIMIZERS))
each_engine = pytest.mark.parametrize("engine", ["eager", "foreach", "host"])

#: What is set in most tests, for optimizers that have it: nothing should be at a value that switches it off.
USUAL: dict[str, Any] = {"lr": 0.05, "adamw_lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "d0": 1.0}

SHAPES: list[tuple[int, ...]] = [(7, 5), (3,), (), (0, 4)]


def make(name: str, params: Iterable[Any], **options: Any) -> RuleOptimizer:
    """An optimizer of the registry with the usual options that it has, and those given."""
    info = optimizer_info(name)
    return info.create(params, **{key: v for key, v in USUAL.items() if key in info.options} | options)


def one_group(name: str, params: Iterable[Any], **options: Any) -> RuleOptimizer:
    """As :func:`make`, with all parameters in one group, which optimizers of matrices step element by element."""
    kinds: dict[str, dict[str, Any]] = {"muon": {"use_muon": False}, "soap": {"max_precond_dim": 1}}
    return make(name, [{"params": list(params), **kinds.get(name, {})}], **options)


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradient(like: Tensor, *key: int) -> Tensor:
    """A gradient for ``like`` that depends on ``key`` (parameter, step) only."""
    generator = torch.Generator().manual_seed(hash(key) % 2**31)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def give_gradients(params: Iterable[Tensor], step: int) -> None:
    for index, p in enumerate(params):
        p.grad = gradient(p, index, step)


def train(optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Steps with the gradients of those numbers."""
    for step in steps:
        give_gradients([p for group in optimizer.param_groups for p in group["params"]], step)
        optimizer.step()


def contents(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of all that an optimizer has, for comparison."""
    return copy.deepcopy(optimizer.state_dict())


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, types and structure included."""
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=f"{where}: {a} and {b}")
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {sorted(map(str, a))} and {sorted(map(str, b))}"
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b, f"{where}: {a!r} and {b!r}"


def weights(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]
