"""Sophia: Algorithm 3 of arXiv:2305.14342, whose authors' code has the same clip and the same order of things."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .shared import Options, State, average

DECAY = "decoupled"
#: Estimates are of size 1 here: so much for the gradient and for the estimate that some elements are clipped.
BASE: dict[str, Any] = {"lr": 0.02, "betas": (0.5, 0.4), "gamma": 1.0, "update_interval": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "every_step": {"update_interval": 1},
    "seldom": {"update_interval": 5, "gamma": 0.3},
    "betas_eps": {"betas": (0.965, 0.99), "gamma": 3.0, "eps": 0.05, "weight_decay": 0.0},
    "no_averages": {"betas": (0.0, 0.0)},
}
INPUTS = ("estimate",)


def update(p: Tensor, g: Tensor, s: State, o: Options, *, estimate: Tensor) -> Tensor:
    beta1, beta2 = o["betas"]
    m = s.get("exp_avg", torch.zeros_like(g))
    # Infinity becomes NaN, as in torch.lerp, at this step or the next one: it is not clipped for ever.
    m = s["exp_avg"] = torch.lerp(m, g, 1 - beta1)
    if o["updates"] % o["update_interval"] == 0:
        average(s, "hessian", estimate, beta2)
    h = s.setdefault("hessian", torch.zeros_like(g))
    return float(o["lr"]) * (m / (o["gamma"] * h).clamp(min=o["eps"])).clamp(-1, 1)
