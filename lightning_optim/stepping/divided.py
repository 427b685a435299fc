"""Refusing what needs all of a model's parameters in an optimizer that is made for only a part of them."""

from __future__ import annotations

import sys
from types import FrameType

#: Modules that make such optimizers, and how each divides the parameters, in words.
_MAKERS = {
    "torch.distributed.optim.zero_redundancy_optimizer": "ZeroRedundancyOptimizer gives each process a part of them",
    "torch.distributed.optim.apply_optimizer_in_backward": "_apply_optimizer_in_backward makes one for each of them",
    "torch.distributed.optim.optimizer": "DistributedOptimizer makes one on each worker, for those that are there",
}


def refuse_a_part(optimizer: str, option: str) -> None:
    """Refuse an option that is about all parameters together, if the optimizer is made for some of them.

    Args:
        optimizer: The optimizer's name.
        option: The option (or another thing) that needs all of them.

    Raises:
        ValueError: The constructor was called by a module that divides the parameters.
    """
    if (maker := divided_by()) is not None:
        raise ValueError(
            f"{optimizer}: {option} is about all parameters together, but {maker}; valid: an optimizer that has all "
            "parameters, or none of this (gradients can be clipped before the step, by whoever has all of them)"
        )


def divided_by() -> str | None:
    """How the caller divides a model's parameters over several optimizers, in words; None if it does not."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if (maker := _MAKERS.get(frame.f_globals.get("__name__", ""))) is not None:
            return maker
        frame = frame.f_back
    return None
