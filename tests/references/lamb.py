"""LAMB: Algorithm 2 of arXiv:1904.00962, phi the identity with an optional upper bound."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .shared import Options, State, adam_direction

DECAY = "none"  # the rule has it in its direction
BASE: dict[str, Any] = {"lr": 0.02}
VARIANTS: dict[str, dict[str, Any]] = {
    "betas_eps": {"betas": (0.3, 0.6), "eps": 0.1},
    "max_weight_norm": {"max_weight_norm": 0.5, "weight_decay": 0.1},
    "max_trust_ratio": {"max_trust_ratio": 0.3},
    "adapt_1d": {"adapt_1d": True, "weight_decay": 0.1},
}


def update(p: Tensor, g: Tensor, s: State, o: Options) -> Tensor:
    r = adam_direction(g, s, o)
    if p.ndim <= 1 and not o["adapt_1d"]:
        return float(o["lr"]) * r
    r = r + o["weight_decay"] * p
    size, step = math.sqrt(float((p * p).sum())), math.sqrt(float((r * r).sum()))
    ratio = min(size, o["max_weight_norm"] or math.inf) / step if size > 0 and step > 0 else 1.0
    return float(o["lr"]) * min(ratio, o["max_trust_ratio"] or math.inf) * r
