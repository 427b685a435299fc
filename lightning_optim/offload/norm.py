"""The norm of all gradients, and the scaling that follows from it, on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.engines.scaling import LossScale, Scaling
from lightning_optim.offload.buckets import OffloadBucket
from lightning_optim.stepping.shards import LocalSquares, total_squares


def summed_squares(work: Sequence[OffloadBucket]) -> Tensor:
    """The sum of squares of all gradients, added in the order of the buckets. Collective for sharded gradients.

    Args:
        work: Buckets whose own sums are known.
    """
    sums: LocalSquares = {}
    for bucket in work:
        for where, parts in (bucket.squares or {}).items():
            # Sums that processes add up stay on the device on which they communicate.
            own = (part.sum().reshape(1) for part in parts)
            sums.setdefault(where, []).extend(own if where else (part.cpu() for part in own))
    totals = [total_squares({where: parts}).sum().cpu() for where, parts in sums.items()]
    return torch.stack(totals).sum() if totals else torch.zeros((), dtype=torch.float64, device="cpu")


def scaling_on_host(max_norm: float | None, loss: LossScale | None, squares: Tensor | None) -> Scaling | None:
    """A scaling with the loss scale and its flag copied to the host, which waits for the device here, once."""
    if max_norm is None and loss is None:
        return None
    if loss is not None:
        scale = None if loss.scale is None else loss.scale.cpu()
        loss = LossScale(scale, loss.found_inf.cpu().clone(), loss.check)
    return Scaling(max_norm, loss, squares)


class FixedScaling(Scaling):
    """Multiplies gradients by a number that is known, and leaves no step out."""

    def __init__(self, number: float) -> None:
        super().__init__()
        object.__setattr__(self, "number", torch.tensor(number, dtype=torch.float64, device="cpu"))

    number: Tensor

    @classmethod
    def of(cls, number: float | None) -> FixedScaling | None:
        """A scaling by this number; None for None, which leaves gradients as they are."""
        return None if number is None else cls(number)

    def skip(self) -> bool:
        """See :meth:`Scaling.skip`."""
        return False

    def factor(self) -> Tensor | None:
        """See :meth:`Scaling.factor`."""
        return self.number


def number_of(scaling: Scaling | None) -> float | None:
    """The factor by which gradients are multiplied; None if they are not."""
    factor = None if scaling is None else scaling.factor()
    return None if factor is None else float(factor)
