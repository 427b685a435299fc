"""SGD: the pseudocode of torch.optim.SGD's documentation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .shared import Options, State

DECAY = "l2"
BASE: dict[str, Any] = {"lr": 0.02, "momentum": 0.9}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.0},
    "plain_l2": {"momentum": 0.0, "weight_decay": 0.1},
    "dampening": {"dampening": 0.4},
    "dampening_l2": {"dampening": 0.4, "weight_decay": 0.1, "maximize": True},
    "nesterov": {"nesterov": True},
    "nesterov_l2": {"nesterov": True, "weight_decay": 0.1},
}


def update(p: Tensor, g: Tensor, s: State, o: Options) -> Tensor:
    lr, mu = float(o["lr"]), o["momentum"]
    if mu == 0:
        return lr * g
    s["momentum_buffer"] = mu * s["momentum_buffer"] + (1 - o["dampening"]) * g if "momentum_buffer" in s else g
    return lr * (g + mu * s["momentum_buffer"]) if o["nesterov"] else lr * s["momentum_buffer"]
