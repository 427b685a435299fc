"""Adam: Algorithm 1 of arXiv:1412.6980; AMSGrad as torch has it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .shared import Options, State, adam_direction

DECAY = "l2"
BASE: dict[str, Any] = {"lr": 0.02}
VARIANTS: dict[str, dict[str, Any]] = {
    "amsgrad": {"amsgrad": True, "betas": (0.8, 0.7)},
    "amsgrad_l2": {"amsgrad": True, "weight_decay": 0.1},
    "betas_eps": {"betas": (0.3, 0.6), "eps": 0.1},
    "no_averages": {"betas": (0.0, 0.0)},
}


def update(p: Tensor, g: Tensor, s: State, o: Options) -> Tensor:
    return float(o["lr"]) * adam_direction(g, s, o)
