"""What steppers know about an optimizer: its rule, its param groups, and the options that hold for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lightning_optim.rules.policy import Decay, Rounding
from lightning_optim.rules.rule import Rule

Group = dict[str, Any]

#: Which part of an update a Program does: all of it; the direction alone; a second direction, computed from the
#: transformed first one; or the move along a direction that is given in place of the gradient.
Part = Literal["all", "direction", "within", "move"]

#: What a rule needs besides gradients: for each name and parameter, a tensor of the parameter's shape.
Inputs = Mapping[str, Mapping[Tensor, Tensor]]


class Method(Protocol):
    """The interface of an optimizer class: see :class:`~lightning_optim.optimizers.base.RuleOptimizer`."""

    rule: Rule

    def public_name(self) -> str:
        """The name under which users know it."""

    def flags(self, group: Group, p: Tensor, fresh: bool) -> dict[str, bool]:
        """Values of the rule's flags."""

    def decay(self, group: Group) -> Decay:
        """How weight decay is applied."""

    def scalars(self, group: Group) -> dict[str, float | Tensor]:
        """The numbers of a param group, by the rule's names."""


class Owner(Protocol):
    """What holds the parameters and the state: a ``torch.optim.Optimizer``."""

    @property
    def param_groups(self) -> list[Group]:
        """The groups of parameters with their options."""

    @property
    def state(self) -> Any:
        """For each parameter, a dict of its slots."""


@dataclass(frozen=True)
class Options:
    """The options that hold for all parameters of one optimizer.

    Attributes:
        engine: Name of the engine, or ``"auto"``.
        rounding: See :class:`~lightning_optim.rules.policy.Policy`.
        state_dtype: Storage type of new slots; None: float32 (float64 for float64 weights).
        max_grad_norm: Clip the global norm of the gradients to this, inside the step; None: no clipping.
        capture: Record the step as a CUDA graph.
        observe: Keep what the rule observes.
    """

    engine: str = "auto"
    rounding: Rounding = "nearest"
    state_dtype: torch.dtype | None = None
    max_grad_norm: float | None = None
    capture: bool = False
    observe: bool = False
