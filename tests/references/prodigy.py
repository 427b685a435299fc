"""Prodigy: Algorithm 4 of arXiv:2306.06101 with the options of its authors' code (konstmish/prodigy)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .shared import Options, State, Update, count

DECAY = "decoupled"
WEIGHTS = ("p0",)
EVERYWHERE = ("d", "d_max", "d_numerator")
BASE: dict[str, Any] = {"lr": 1.0, "d0": 1e-2}
VARIANTS: dict[str, dict[str, Any]] = {
    "betas": {"betas": (0.3, 0.6), "eps": 0.1},
    "beta3": {"beta3": 0.5},
    "bias_correction": {"use_bias_correction": True, "weight_decay": 0.1},
    "safeguard_warmup": {"safeguard_warmup": True, "lr": 0.5},
    "growth_rate": {"growth_rate": 1.2, "d_coef": 2.0},
}


def updates(ps: Sequence[Tensor], gs: Sequence[Tensor], ss: Sequence[State], os: Sequence[Options]) -> list[Update]:
    first = os[0]
    known = next((s for s in ss if "d" in s), None)
    start = torch.tensor(float(first["d0"]), dtype=torch.float64)
    d, d_max = (float(known[key] if known else start) for key in ("d", "d_max"))
    numerator = float(known["d_numerator"]) if known else 0.0
    beta3 = math.sqrt(first["betas"][1]) if first["beta3"] is None else first["beta3"]
    numerator, denominator, sizes = beta3 * numerator, 0.0, []
    for p, g, s, o in zip(ps, gs, ss, os, strict=True):
        t, (beta1, beta2), d0 = count(s), o["betas"], first["d0"]
        correction = math.sqrt(1 - beta2**t) / (1 - beta1**t) if o["use_bias_correction"] else 1.0
        size = d * float(o["lr"]) * correction
        sizes.append(size)
        zeros = torch.zeros_like(g)
        s.setdefault("p0", p.clone())
        for slot in ("exp_avg", "exp_avg_sq", "s"):
            s.setdefault(slot, zeros)
        if float(o["lr"]) > 0:
            numerator += d / d0 * size * float((g * (s["p0"] - p)).sum())
            s["exp_avg"] = beta1 * s["exp_avg"] + d * (1 - beta1) * g
            s["exp_avg_sq"] = beta2 * s["exp_avg_sq"] + d * d * (1 - beta2) * g * g
            s["s"] = beta3 * s["s"] + d / d0 * (d if o["safeguard_warmup"] else size) * g
        denominator += float(s["s"].abs().sum())
    estimate = first["d_coef"] * numerator / denominator if denominator > 0 else 0.0
    new_d = max(d, estimate) if math.isclose(d, first["d0"], rel_tol=1e-6) else d
    d_max = max(d_max, estimate)
    new_d = min(d_max, new_d * first["growth_rate"])
    steps: list[Update] = []
    for s, o, size in zip(ss, os, sizes, strict=True):
        for key, value in (("d", new_d), ("d_max", d_max), ("d_numerator", numerator)):
            s[key] = torch.tensor(value, dtype=torch.float64)
        direction = s["exp_avg"] / (s["exp_avg_sq"].sqrt() + new_d * o["eps"])
        steps.append((size if denominator > 0 else 0.0, direction))
    return steps
