"""What a plan depends on and a step may change, apart from what is read of each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_optim.stepping.plan import Planner


@dataclass(frozen=True)
class Structure:
    """Plans may serve another step if this is the same.

    Attributes:
        params: By identity: plans keep them alive.
        sizes: Of the param groups.
        absent: Which parameters have no gradient; empty if all have one.
        static: What of each group's options is compiled in.
        copies, scaled, undo: Of the call.
        inference: Whether tensors are made that cannot be written later.
    """

    params: list[int]
    sizes: list[int]
    absent: list[bool]
    static: list[tuple[Any, ...]]
    copies: bool
    scaled: bool
    undo: bool
    inference: bool


def describe(
    planner: Planner,
    params: list[Tensor],
    found: Sequence[Tensor | None],
    gradients: list[Tensor],
    *,
    copies: bool,
    scaled: bool,
    undo: bool,
) -> Structure:
    """The structure of a step.

    Args:
        planner: Knows the groups.
        params: All parameters.
        found: The gradient or None of each.
        gradients: Those that are there.
        copies: Whether there are any.
        scaled: Whether gradients are multiplied by something.
        undo: Whether old values are kept.
    """
    groups = planner.owner.param_groups
    return Structure(
        params=list(map(id, params)),
        sizes=[len(group["params"]) for group in groups],
        absent=[g is None for g in found] if len(gradients) < len(found) else [],
        static=list(map(planner.static, groups)),
        copies=copies,
        scaled=scaled,
        undo=undo,
        inference=torch.is_inference_mode_enabled(),
    )
