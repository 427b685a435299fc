"""What a plan depends on and may change from step to step, apart from the reading of each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_optim.stepping.plan import Planner


@dataclass(frozen=True)
class Structure:
    """The structure of a step; a plan may serve another step if that step's structure is equal.

    Attributes:
        params: The identities of the parameters, which plans keep alive.
        sizes: The numbers of parameters in the param groups.
        absent: Which parameters have no gradient; empty if all have one.
        static: The values of each group's options that are compiled in.
        copies, scaled, undo: As in :func:`describe`.
        inference: Whether inference mode is on, in which new tensors cannot be written later.
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
        gradients: The gradients that are not None.
        copies: Whether new weights are also written to copies.
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
