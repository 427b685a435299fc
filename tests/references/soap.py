"""Vyas et al., SOAP (arXiv:2409.11321), as its authors' code has it, one dimension after the other.

Eigenvectors are not unique: of equal eigenvalues any will do, and signs are free. So where it is told what a step has
made (``o["made"]``), it checks that these are orthogonal bases of the kind that they must be, and goes on from them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .shared import Options, State, average

DECAY = "after"
BASE: dict[str, Any] = {"lr": 0.02, "precondition_frequency": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "betas_eps": {"betas": (0.3, 0.6), "eps": 0.1},
    "no_decay": {"weight_decay": 0.0},
    "every_step": {"precondition_frequency": 1},
    "one_side": {"max_precond_dim": 3},
    "no_sides": {"max_precond_dim": 1, "weight_decay": 0.1},
    "shampoo_beta": {"shampoo_beta": 0.7},
}


#: Rotations make each element a sum over its row and column, and products sum over thousands.
MIXES = 64.0


def spread(o: Options) -> float:
    """Where the gradient is small in its eigenbasis, a quotient of its averages has the rounding of the large ones."""
    return 2000.0


def dimensions(p: Tensor, o: Options) -> list[int]:
    """Those that have a basis."""
    if p.numel() == 0 or p.ndim < 2:
        return []
    return [d for d in range(p.ndim) if p.shape[d] <= o["max_precond_dim"]]


def along(x: Tensor, d: int, matrix: Tensor) -> Tensor:
    """The product of a matrix with each fibre of a tensor along a dimension."""
    return torch.tensordot(matrix, x, dims=([1], [d])).movedim(0, d)


def rotated(x: Tensor, s: State, sides: list[int], *, back: bool = False) -> Tensor:
    for d in sides:
        x = along(x, d, s[f"q_{d}"] if back else s[f"q_{d}"].T)
    return x


def product(g: Tensor, d: int) -> Tensor:
    rows = g.movedim(d, 0).reshape(g.shape[d], -1)
    return rows @ rows.T


def eigenvectors(matrix: Tensor) -> Tensor:
    """By falling eigenvalue; of what is no number there are none."""
    if not bool(matrix.isfinite().all()):
        return torch.full_like(matrix, math.nan)
    return torch.linalg.eigh(matrix).eigenvectors.flip(-1)


def settled(d: int, own: Tensor, matrix: Tensor, turned: Tensor | None, o: Options) -> Tensor:
    """The basis that the step has made, if it is one: eigenvectors, or what makes a turned basis triangular."""
    if f"q_{d}" not in o.get("made", {}):
        return own
    basis = o["made"][f"q_{d}"].double()
    # As many roundings of float32 as the largest of these tests needs; float64 is held to its own in tests/soap.
    close, size = 1e-5, float(matrix.abs().max())
    assert float((basis.T @ basis - torch.eye(len(basis), dtype=basis.dtype)).abs().max()) < close
    left = basis.T @ matrix @ basis if turned is None else basis.T @ turned
    assert float(left.tril(-1).abs().max()) <= close * size, (d, left)
    return basis


def update(p: Tensor, g: Tensor, s: State, o: Options) -> Tensor | tuple[float, Tensor]:
    sides = [] if o.get("is_complex") else dimensions(p, o)
    (beta1, beta2), lr = o["betas"], float(o["lr"])
    beta = beta2 if o["shampoo_beta"] is None else o["shampoo_beta"]
    if "exp_avg" not in s:
        s.update(exp_avg=torch.zeros_like(g), exp_avg_sq=torch.zeros_like(g), step=torch.zeros((), dtype=torch.float64))
        for d in sides:
            s[f"gg_{d}"] = (1 - beta) * product(g, d)
            s[f"q_{d}"] = settled(d, eigenvectors(s[f"gg_{d}"]), s[f"gg_{d}"], None, o)
        if p.numel():
            return 0.0, torch.zeros_like(p)
    s["step"] = s["step"] + 1
    t = int(s["step"])
    turned = rotated(g, s, sides)
    m, v = average(s, "exp_avg", turned, beta1), average(s, "exp_avg_sq", turned * turned, beta2)
    direction = rotated(m / (v.sqrt() + o["eps"]), s, sides, back=True)
    for d in sides:
        average(s, f"gg_{d}", product(g, d), beta)
    if o["updates"] and o["updates"] % o["precondition_frequency"] == 0:
        renew(s, sides, o)
    return lr * math.sqrt(1 - beta2**t) / (1 - beta1**t) * direction


def renew(s: State, sides: list[int], o: Options) -> None:
    """Turn the bases, and the averages with them, which have been stored meanwhile."""
    for name in ("exp_avg", "exp_avg_sq") if "made" in o else ():
        s[name] = s[name].to(o["made"][name].dtype).double()
    whole = rotated(s["exp_avg"], s, sides, back=True)
    for d in sides:
        old = s[f"q_{d}"]
        order = (old * (s[f"gg_{d}"] @ old)).sum(0).argsort(descending=True, stable=True)
        s["exp_avg_sq"] = s["exp_avg_sq"].index_select(d, order)
        turned = s[f"gg_{d}"] @ old[:, order]
        s[f"q_{d}"] = settled(d, torch.linalg.qr(turned).Q, s[f"gg_{d}"], turned, o)
    s["exp_avg"] = rotated(whole, s, sides)
