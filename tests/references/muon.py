"""Keller Jordan's Muon, or AdamW; the size of the update as in torch.optim.Muon's ``adjust_lr_fn``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .shared import Options, State, adam_direction, average

DECAY = "decoupled"
BASE: dict[str, Any] = {"lr": 0.03}
VARIANTS: dict[str, dict[str, Any]] = {
    "no_nesterov": {"nesterov": False, "momentum": 0.7},
    "few_steps": {"ns_steps": 3},
    "polar_express": {"ns_coefficients": "polar_express", "ns_steps": 6},
    "match_rms_adamw": {"adjust_lr": "match_rms_adamw", "weight_decay": 0.0},
    "one_matrix": {"stacked": False},
    "adamw": {"adamw_lr": 0.01, "betas": (0.3, 0.6), "eps": 0.1, "adamw_patterns": ["*"]},
}

#: The first six steps of Algorithm 1 of arXiv:2505.16932 (its authors' published numbers); all but the last of the
#: algorithm's eight are evaluated at 1 / 1.01 of their argument.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)


def spread(o: Options) -> float:
    """A Newton-Schulz step multiplies what rounding did to a small singular value by up to 3.4445 (8.3 for Polar
    Express), and each element of the result is a sum over all singular values (measured over the tests: up to 14).
    """
    return 64.0 if o["use_muon"] else 0.0


def newton_schulz(m: Tensor, o: Options) -> Tensor:
    """Of https://kellerjordan.github.io/posts/muon, in float64, on the side on which the Gram matrix is small."""
    if m.shape[0] > m.shape[1]:
        return newton_schulz(m.T, o).T
    x = m / max(math.sqrt(float((m * m).sum())), 1e-7)
    for step in range(o["ns_steps"]):
        if o["ns_coefficients"] == "muon":
            a, b, c = 3.4445, -4.7750, 2.0315
        else:
            a, b, c = (k / 1.01**power for k, power in zip(POLAR_EXPRESS[step], (1, 3, 5), strict=True))
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def update(p: Tensor, g: Tensor, s: State, o: Options) -> Tensor:
    if not o["use_muon"]:
        return float(o["lr"]) * adam_direction(g, s, o)
    mu = o["momentum"]
    m = average(s, "momentum_buffer", g, mu)
    m = (1 - mu) * g + mu * m if o["nesterov"] else m
    stack = m if p.ndim == 3 and o["stacked"] else m.reshape(1, len(m), -1)
    rows, columns = stack.shape[1:]
    size = math.sqrt(max(1.0, rows / columns)) if o["adjust_lr"] == "original" else 0.2 * math.sqrt(max(rows, columns))
    direction = torch.stack([newton_schulz(matrix, o) for matrix in stack]).reshape(p.shape)
    return float(o["lr"]) * size * direction
