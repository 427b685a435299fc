"""The four ways of clipping once more, one number after the other in float64, as in a plain PyTorch loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.control.clipping import AdaGC

Reference = Callable[[Sequence[Tensor]], None]


def by_norm(max_norm: float) -> Reference:
    return lambda params: _scale_all(params, max_norm)


def by_value(max_value: float) -> Reference:
    return lambda params: torch.nn.utils.clip_grad_value_(params, max_value)


def agc(clip_factor: float = 0.01, eps: float = 1e-3) -> Reference:
    """arXiv:2102.06171, equation 3, row by row."""

    def clip(params: Sequence[Tensor]) -> None:
        for p in params:
            if p.grad is None:
                continue
            rows = [p.grad] if p.ndim < 2 else list(p.grad)
            weights = [p.detach()] if p.ndim < 2 else list(p.detach())
            for row, weight in zip(rows, weights, strict=True):
                norm, limit = _norm(row), clip_factor * max(_norm(weight), eps)
                if norm > limit:
                    row.mul_(limit / norm)

    return clip


class AdaGCReference:
    """The authors' code (github.com/lishuai-97/AdaGC), without zeros in the averages and with a floor under them."""

    def __init__(
        self,
        ratio: float = 1.04,
        beta: float = 0.99,
        warmup_steps: int = 100,
        max_norm: float = 1.0,
        floor: float = 0.01,
    ) -> None:
        self.ratio, self.beta, self.warmup_steps, self.max_norm, self.floor = ratio, beta, warmup_steps, max_norm, floor
        self.steps = 0
        self.averages: dict[int, float] = {}

    def __call__(self, params: Sequence[Tensor]) -> None:
        self.steps += 1
        there = {number: p for number, p in enumerate(params) if p.grad is not None}
        if self.steps <= self.warmup_steps:
            _scale_all(list(there.values()), self.max_norm)
        elements = sum(p.numel() for p in there.values())
        for number, p in there.items():
            assert p.grad is not None
            norm = _norm(p.grad)
            if self.steps > self.warmup_steps:
                least = self.floor * self.max_norm * math.sqrt(p.numel() / elements)
                average = max(self.averages[number], least) if number in self.averages else None
                limit = self.max_norm if average is None else self.ratio * average
                if norm > limit:
                    p.grad.mul_(limit / (norm + 1e-6))
                    norm = limit
                if norm > 0:
                    self.averages[number] = norm if average is None else self.beta * average + (1 - self.beta) * norm
            elif norm > 0:
                self.averages[number] = min(norm, self.averages.get(number, math.inf))


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def _scale_all(params: Sequence[Tensor], max_norm: float) -> None:
    total = math.sqrt(sum(_norm(p.grad) ** 2 for p in params if p.grad is not None))
    for p in params:
        if p.grad is not None:
            p.grad.mul_(min(1.0, max_norm / (total + 1e-6)))


_ADAGC: dict[str, Any] = {"ratio": 1.1, "beta": 0.8, "warmup_steps": 2, "max_norm": 3.0}

#: Each way -> options of ours with which it clips now and then, and the reference.
WAYS: dict[str, tuple[dict[str, Any], Callable[[], Reference]]] = {
    "max_norm": ({"max_norm": 0.5}, lambda: by_norm(0.5)),
    "max_value": ({"max_value": 0.1}, lambda: by_value(0.1)),
    "agc": ({"agc": 0.1}, lambda: agc(0.1)),
    "adagc": ({"adagc": AdaGC(**_ADAGC)}, lambda: AdaGCReference(**_ADAGC)),
}
