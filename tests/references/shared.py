"""What the references have in common: caution and clipping around a rule, and pieces of several rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Options: TypeAlias = Mapping[str, Any]
State: TypeAlias = dict[str, Tensor]
#: What is subtracted from a weight; or the step's effective size, by which decay goes too, and the direction.
Update: TypeAlias = Tensor | tuple[float | Tensor, Tensor]


def average(s: State, name: str, x: Tensor, beta: float) -> Tensor:
    """An exponential average that starts from zero."""
    s[name] = beta * s.get(name, torch.zeros_like(x)) + (1 - beta) * x
    return s[name]


def count(s: State) -> int:
    """The number of this step of a parameter, from 1."""
    s["step"] = s.get("step", torch.zeros((), dtype=torch.float64)) + 1
    return int(s["step"])


def adam_direction(g: Tensor, s: State, o: Options) -> Tensor:
    """Algorithm 1 of arXiv:1412.6980; AMSGrad as torch has it (the maximum of the uncorrected average)."""
    t, (beta1, beta2) = count(s), o["betas"]
    m_hat = average(s, "exp_avg", g, beta1) / (1 - beta1**t)
    v = average(s, "exp_avg_sq", g * g, beta2)
    if o.get("amsgrad"):
        v = s["max_exp_avg_sq"] = torch.maximum(s.get("max_exp_avg_sq", torch.zeros_like(v)), v)
    return m_hat / ((v / (1 - beta2**t)).sqrt() + o["eps"])


def cautious(update: Tensor, g: Tensor) -> Tensor:
    """The mask of arXiv:2411.16085, as its authors' code has it."""
    mask = (update * g > 0).to(update.dtype)
    return update * mask / mask.mean().clamp(min=1e-3) if mask.numel() else update


def clip_coefficient(gradients: Sequence[Tensor], max_norm: float | None) -> float:
    """What ``torch.nn.utils.clip_grad_norm_`` multiplies all gradients by."""
    if max_norm is None:
        return 1.0
    total = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    return min(1.0, max_norm / (total + 1e-6))
