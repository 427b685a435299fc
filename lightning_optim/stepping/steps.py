"""The interface that all ways to make a step have in common."""

from __future__ import annotations

from typing import Protocol

from lightning_optim.engines.base import Decision
from lightning_optim.engines.scaling import LossScale, Scaling
from lightning_optim.stepping.method import Inputs


class Steps(Protocol):
    """Steps parameters: an optimizer's own stepper, an adopted optimizer, the detached pipeline, the backward pass."""

    @property
    def scaling(self) -> Scaling | None:
        """How the gradients of the last step were unscaled and clipped; None if they were not."""

    def step(
        self,
        *,
        inputs: Inputs | None = None,
        loss: LossScale | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        """Update every parameter that has a gradient.

        Args:
            inputs: What the rule needs besides gradients: for each name and parameter, a tensor of its shape.
            loss: How the loss was scaled, and whether the step is to be left out.
            max_grad_norm: Clip the gradients' global norm to this; default: what the options say.
        """

    def report(self, *, scaled: bool = False) -> list[Decision]:
        """Which engine steps which parameters, and why.

        Args:
            scaled: Whether the loss is scaled.
        """
