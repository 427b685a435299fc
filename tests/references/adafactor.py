"""Adafactor: the pseudocode of torch.optim.Adafactor's documentation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .shared import Options, State, count

DECAY = "decoupled"
TWIN_TAKES_EMPTY = False
BASE: dict[str, Any] = {"lr": 0.05}
VARIANTS: dict[str, dict[str, Any]] = {
    "beta2_decay": {"beta2_decay": -0.4},
    "eps": {"eps": (1e-2, 0.3)},
    "large_lr": {"lr": 10.0},
    "d": {"d": 1.5, "beta2_decay": -0.3},
}


def _rms(x: Tensor) -> float:
    return math.sqrt(float((x * x).sum()) / max(x.numel(), 1))


def _moved(s: State, name: str, x: Tensor, weight: float) -> Tensor:
    s[name] = s.get(name, torch.zeros_like(x)) * (1 - weight) + weight * x
    return s[name]


def update(p: Tensor, g: Tensor, s: State, o: Options) -> Tensor:
    t, (eps1, eps2) = count(s), o["eps"]
    eps1 = float(torch.finfo(o.get("weight_dtype", torch.float32)).eps) if eps1 is None else eps1
    weight = t ** o["beta2_decay"]
    if g.ndim > 1:
        rows = _moved(s, "row_var", (g * g).sum(-1, keepdim=True) / max(g.shape[-1], 1), weight)
        columns = _moved(s, "col_var", (g * g).sum(-2, keepdim=True) / max(g.shape[-2], 1), weight)
        mean = rows.sum(-2, keepdim=True) / max(g.shape[-2], 1)
        v = rows * columns / mean.clamp(min=eps1)
    else:
        v = _moved(s, "variance", g * g, weight)
    direction = g / v.clamp(min=eps1 * eps1).sqrt()
    size = max(eps2, _rms(p)) * min(float(o["lr"]), 1 / math.sqrt(t))
    return size / max(1.0, _rms(direction) / o["d"]) * direction
