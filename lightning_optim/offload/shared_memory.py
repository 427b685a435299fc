"""Refusing weights that share memory without being one parameter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_optim.engines.memory import overlap, overlaps_itself


def check_memory(weights: Sequence[Tensor]) -> None:
    """Refuse weights that share memory: each would have a master of its own, and the last to arrive would win.

    Args:
        weights: All weights.

    Raises:
        ValueError: Two of them, or two elements of one, have a place in memory in common.
    """
    found = next(([number] for number, p in enumerate(weights) if p.numel() and overlaps_itself(p)), None)
    if found is None and (shared := overlap(weights)) is not None:
        found = [*shared[1], shared[0]]
    if found is not None:
        shapes = " and ".join(str(tuple(weights[number].shape)) for number in found[-3:])
        raise ValueError(
            f"detached: weights of shapes {shapes} share memory, and each would be updated without the others; "
            "valid: tie weights by giving both modules the same Parameter"
        )
