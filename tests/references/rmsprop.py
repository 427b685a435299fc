"""RMSprop: the pseudocode of torch.optim.RMSprop's documentation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .shared import Options, State, average, count

DECAY = "l2"
BASE: dict[str, Any] = {"lr": 0.02}
VARIANTS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True, "eps": 1e-2},
    "centered_momentum": {"centered": True, "momentum": 0.5, "alpha": 0.6, "eps": 1e-2},
    "alpha_eps": {"alpha": 0.3, "eps": 0.1},
}


def update(p: Tensor, g: Tensor, s: State, o: Options) -> Tensor:
    count(s)
    v = average(s, "square_avg", g * g, o["alpha"])
    if o["centered"]:
        mean = average(s, "grad_avg", g, o["alpha"])
        v = v - mean * mean
    direction = g / (v.sqrt() + o["eps"])
    if o["momentum"] > 0:
        buffer = s.get("momentum_buffer", torch.zeros_like(g))
        direction = s["momentum_buffer"] = o["momentum"] * buffer + direction
    return float(o["lr"]) * direction
