"""Schedule-Free AdamW: arXiv:2405.15682, in its x, y and z, as its authors' code has warmup and weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .shared import Options, State, average, count

DECAY = "none"  # the rule has it in its direction
WEIGHTS = ("z",)
BASE: dict[str, Any] = {"lr": 0.05}
VARIANTS: dict[str, dict[str, Any]] = {
    "betas_eps": {"betas": (0.3, 0.6), "eps": 0.1},
    "warmup": {"warmup_steps": 6, "weight_decay": 0.1},
    "powers": {"r": 1.5, "weight_lr_power": 0.5, "warmup_steps": 3},
}


def update(p: Tensor, g: Tensor, s: State, o: Options) -> Tensor:
    t, (beta1, beta2) = count(s), o["betas"]
    zero = torch.zeros((), dtype=torch.float64)
    size = float(o["lr"]) * (min(1.0, t / o["warmup_steps"]) if o["warmup_steps"] else 1.0)
    s["lr_max"] = torch.maximum(s.get("lr_max", zero), zero + size)
    weight = t ** o["r"] * float(s["lr_max"]) ** o["weight_lr_power"]
    s["weight_sum"] = s.get("weight_sum", zero) + weight
    c = weight / float(s["weight_sum"]) if float(s["weight_sum"]) > 0 else 0.0
    z = s.get("z", p)
    x = (p - (1 - beta1) * z) / beta1
    v = average(s, "exp_avg_sq", g * g, beta2)
    u = g / (v.sqrt() / math.sqrt(1 - beta2**t) + o["eps"]) + o["weight_decay"] * p
    s["z"] = z - size * u
    x = (1 - c) * x + c * s["z"]
    return p - ((1 - beta1) * s["z"] + beta1 * x)


def evaluate(p: Tensor, s: State, o: Options) -> Tensor:
    beta1 = o["betas"][0]
    return (p - (1 - beta1) * s["z"]) / beta1
