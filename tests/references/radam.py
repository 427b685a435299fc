"""RAdam: Algorithm 2 of arXiv:1908.03265, rectified from a length of 5 on, as torch and the authors' code have it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .shared import Options, State, average, count

DECAY = "l2"
BASE: dict[str, Any] = {"lr": 0.02}
VARIANTS: dict[str, dict[str, Any]] = {
    "betas_eps": {"betas": (0.3, 0.8), "eps": 0.1},
    "never_rectified": {"betas": (0.9, 0.5)},
    "at_once": {"betas": (0.5, 0.99), "weight_decay": 0.1, "decoupled_weight_decay": True},
}


def update(p: Tensor, g: Tensor, s: State, o: Options) -> Tensor:
    t, (beta1, beta2) = count(s), o["betas"]
    m = average(s, "exp_avg", g, beta1) / (1 - beta1**t)
    v = average(s, "exp_avg_sq", g * g, beta2)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    if length <= 5:
        return float(o["lr"]) * m
    r = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    return float(o["lr"]) * r * m * math.sqrt(1 - beta2**t) / (v.sqrt() + o["eps"])
