"""Optimizers that our engines do not step, whichever of torch's they do: they take none of its subclasses."""

from __future__ import annotations

import torch


class Foreign(torch.optim.RMSprop):
    """A step of its own."""


class ForeignAdagrad(torch.optim.Adagrad):
    """Another, whose state is made with the optimizer."""


class ForeignNAdam(torch.optim.NAdam):
    """Another, with a state that is no tensor of the weight's shape."""
