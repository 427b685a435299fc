"""The numbers of a param group, by a rule's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from lightning_optim.rules.rule import Rule


def scalars_of(rule: Rule, group: Mapping[str, Any]) -> dict[str, float | Tensor]:
    """The numbers of a group that a rule and its policy may ask for: ``betas`` gives ``beta1``, ``beta2``, ..."""
    values = {f"beta{i}": _number(beta) for i, beta in enumerate(group.get("betas", ()), start=1)}
    for name in (*rule.scalars, "lr", "weight_decay"):
        if name in group:
            values[name] = _number(group[name])
    return values


def _number(value: Any) -> float | Tensor:
    if isinstance(value, Tensor):
        return value.item() if value.device.type == "cpu" else value
    return cast(float, value)
