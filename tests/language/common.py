"""Rules that use the language's parts, as optimizers, and a few steps with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim.engines import ENGINES
from lightning_optim.optimizers import RuleOptimizer
from lightning_optim.rules import Rule, Slot, Step
from lightning_optim.rules.ops import maximum, mean, norm, sqrt, sum, total

ENGINE = pytest.mark.parametrize(
    "engine", [name for name in ("eager", "foreach", "host") if ENGINES[name].unavailable() is None]
)


def meeting(
    p: Any, g: Any, p0: Any, length: Any, scale: Any, travelled: Any, *, lr: Any, keep: Any, start: Any, step: Any
) -> Any:
    """Slots of one number each, and two phases: the second total is of what the first one gave."""
    travelled = keep * travelled + total(step * sum(g * (p0 - p)))
    length = 0.5 * length + norm(g)
    scale = maximum(scale, travelled / total(sum(abs(g)) / (1 + abs(travelled))))
    return Step(scale * lr, g / length, {"length": norm(g)}), p0, length, scale, travelled


class Meeting(RuleOptimizer):
    rule = Rule(
        meeting,
        slots={
            "p0": Slot(init="p"),
            "length": Slot(init=1.0, rate="scalar"),
            "scale": Slot(init="start", rate="shared"),
            "travelled": Slot(rate="shared"),
        },
        shared=("keep", "start"),
        observe=("length",),
    )

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        weight_decay: float = 0.1,
        keep: float = 0.9,
        start: float = 0.5,
        **common: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "keep": keep, "start": start}, **common)


def sided(p: Any, g: Any, rows: Any, columns: Any, whole: Any, *, lr: Any, eps: Any, factored: bool) -> Any:
    """Rows and columns, where a weight has them."""
    if not factored:
        whole = 0.9 * whole + 0.1 * (g * g)
        return lr * g / sqrt(whole + eps), whole
    rows = 0.9 * rows + 0.1 * mean(g * g, over="columns")
    columns = 0.9 * columns + 0.1 * mean(g * g, over="rows")
    return lr * g / sqrt(rows * columns / maximum(mean(rows, over="rows"), eps) + eps), rows, columns


class Sided(RuleOptimizer):
    rule = Rule(
        sided,
        slots={
            "rows": Slot(rate="row", when="factored"),
            "columns": Slot(rate="column", when="factored"),
            "whole": Slot(unless="factored"),
        },
    )

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.1, eps: float = 1e-3, **common: Any):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "eps": eps}, **common)

    @classmethod
    def flags(cls, group: dict[str, Any], p: Tensor, fresh: bool) -> dict[str, bool]:
        return {"factored": p.ndim > 1}


def refreshed(p: Any, g: Any, curvature: Any, estimate: Any, *, lr: Any, refresh: bool) -> Any:
    """Something that comes from outside at every third step."""
    if refresh:
        curvature = estimate
    return lr * g / (1 + curvature), curvature


class Refreshed(RuleOptimizer):
    rule = Rule(refreshed, inputs={"estimate": "refresh"}, every={"refresh": "interval"})

    def __init__(self, params: Any, lr: float = 0.1, interval: int = 3, **common: Any) -> None:
        super().__init__(params, {"lr": lr, "interval": interval, "updates": 0}, **common)


SHAPES = ((3, 4), (5,), (2, 3, 4), (0,), ())


def weights(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def train(optimizer: RuleOptimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]
