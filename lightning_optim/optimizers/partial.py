"""Optimizers that somebody makes for a part of a model's parameters, so that a norm over theirs is not the model's."""

from __future__ import annotations

import sys

#: Modules that make optimizers so, and what each of these then has.
_MAKERS = {
    "torch.distributed.optim.zero_redundancy_optimizer": "ZeroRedundancyOptimizer gives each process a part of them",
    "torch.distributed.optim.apply_optimizer_in_backward": "_apply_optimizer_in_backward makes one for each of them",
    "torch.distributed.optim.optimizer": "DistributedOptimizer makes one on each worker, for those that are there",
}


def refuse_a_part(optimizer: str, option: str) -> None:
    """Refuse an option that needs a norm over all parameters where the optimizer is made for some of them.

    Args:
        optimizer: The optimizer's name.
        option: What needs the norm.

    Raises:
        ValueError: Whoever calls the constructor divides the parameters.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if (maker := _MAKERS.get(frame.f_globals.get("__name__", ""))) is not None:
            raise ValueError(
                f"{optimizer}: {option} is about all parameters together, but {maker}; valid: an optimizer that has "
                "all parameters, or none of this (gradients can be clipped before the step, by whoever has all of them)"
            )
        frame = frame.f_back  # type: ignore[assignment] # the last one has none
