"""Hessian-vector products of a window, added up over its batches as gradients are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_optim.stepping.curvature import hessian_vector


class Products:
    """Hessian-vector products, whose :meth:`add` replaces the backward pass in ``Window.replay``.

    The direction is the same for all batches, so that the sum is the product with the whole window's Hessian.

    Args:
        directions: The direction, by parameter.
        loss_scale: Factor on losses before they are differentiated, without which products in float16 underflow.

    Attributes:
        sums: The sums so far, by parameter; gradients that were dropped in the window are to be dropped from it.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> products = Products({weight: torch.ones(2)})
    >>> for power in (2, 3):
    ...     products.add((weight**power).sum())
    >>> products.result()[weight]
    tensor([ 8., 14.])
    """

    def __init__(self, directions: Mapping[Tensor, Tensor], loss_scale: Tensor | None = None) -> None:
        self._directions, self._loss_scale = directions, loss_scale
        self.sums: dict[Tensor, Tensor] = {}

    def add(self, loss: Tensor) -> None:
        """Add the products of a batch's loss."""
        scaled = loss if self._loss_scale is None else loss * self._loss_scale.to(loss.device, non_blocking=True)
        with torch.no_grad():
            for p, product in hessian_vector(scaled, self._directions).items():
                self.sums[p] = self.sums[p].add_(product) if p in self.sums else product.clone()

    @torch.no_grad()
    def result(self) -> dict[Tensor, Tensor]:
        """The sums of all parameters, without the loss scale; zeros where nothing is left."""
        found = {p: self.sums[p] if p in self.sums else torch.zeros_like(u) for p, u in self._directions.items()}
        if self._loss_scale is not None:
            for product in found.values():
                product.div_(self._loss_scale.to(product.device, non_blocking=True))
        return found
