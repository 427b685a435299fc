"""Lion: Algorithm 2 of arXiv:2302.06675."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .shared import Options, State, average

DECAY = "decoupled"
BASE: dict[str, Any] = {"lr": 0.02}
VARIANTS: dict[str, dict[str, Any]] = {"betas": {"betas": (0.3, 0.8)}}


def update(p: Tensor, g: Tensor, s: State, o: Options) -> Tensor:
    beta1, beta2 = o["betas"]
    c = beta1 * s.get("exp_avg", torch.zeros_like(g)) + (1 - beta1) * g
    average(s, "exp_avg", g, beta2)
    return float(o["lr"]) * torch.where(c > 0, 1.0, torch.where(c < 0, -1.0, 0.0)).double()
