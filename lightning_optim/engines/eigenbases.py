"""Eigenbases of averaged products of gradients, and rotations into them: the mathematics of SOAP.

All functions work on stacks: the first dimension counts the tensors, the others are the tensors' own. ``bases`` maps
the number of a tensor's dimension to a stack of orthogonal matrices with the eigenvectors as columns; dimensions
without one are not rotated.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_optim.engines.ambient import no_autocast

Bases = Mapping[int, Tensor]

#: Added to the diagonal, so that a matrix of zeros has eigenvectors too, as in the authors' code.
_SMALL = 1e-30


def rotate(x: Tensor, bases: Bases, *, back: bool = False) -> Tensor:
    """Tensors in the coordinates of their bases; or from these, back to their own.

    >>> turn = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    >>> x = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    >>> rotate(x, {0: turn})
    tensor([[[ 4.,  5.,  6.],
             [-1., -2., -3.]]])
    >>> torch.equal(rotate(rotate(x, {0: turn}), {0: turn}, back=True), x)
    True
    """
    with no_autocast(x.device.type):  # a step inside of autocast should be the same step
        for dimension, basis in bases.items():
            moved = x.movedim(dimension + 1, -1)
            flat = torch.bmm(moved.reshape(len(x), -1, moved.shape[-1]), basis.mT if back else basis)
            x = flat.view(moved.shape).movedim(-1, dimension + 1)
    return x


def products(x: Tensor, dimension: int) -> Tensor:
    """The product of each tensor with itself over all dimensions but one: ``g gᵀ`` of a matrix for dimension 0."""
    with no_autocast(x.device.type):
        moved = x.movedim(dimension + 1, -1)
        flat = moved.reshape(len(x), -1, moved.shape[-1])
        return torch.bmm(flat.mT, flat)


def eigenbasis(matrices: Tensor) -> Tensor:
    """The eigenvectors of symmetric matrices, by falling eigenvalue; NaN for a matrix that has a NaN or infinity.

    On CUDA this waits for the device, since torch checks there whether its solver has converged.
    """
    finite = torch.isfinite(matrices).all(-1, keepdim=True).all(-2, keepdim=True)
    known = torch.where(finite, matrices, 0.0)
    known = known + _SMALL * torch.eye(known.shape[-1], dtype=known.dtype, device=known.device)
    try:
        vectors = torch.linalg.eigh(known).eigenvectors
    except torch.linalg.LinAlgError:  # in float32, this may fail for matrices that are nearly singular
        vectors = torch.linalg.eigh(known.double()).eigenvectors.to(known.dtype)
    return torch.where(finite, vectors.flip(-1), torch.nan)


def refined(matrices: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration towards the eigenvectors of symmetric matrices, from bases that are close to them.

    Nothing waits for the device.

    Returns:
        The new bases, and for each the order in which it takes the columns of the old one: by falling eigenvalue.
    """
    with no_autocast(matrices.device.type):
        turned = torch.bmm(matrices, basis)
        order = (basis * turned).sum(-2).argsort(dim=-1, descending=True, stable=True)
        turned = torch.take_along_dim(turned, order.unsqueeze(-2), dim=-1)
        return torch.linalg.qr(turned).Q, order


def reordered(x: Tensor, dimension: int, order: Tensor) -> Tensor:
    """Tensors with the coordinates of one dimension reordered, each tensor by its own order."""
    shape = [len(x), *(1 for _ in range(x.ndim - 1))]
    shape[dimension + 1] = order.shape[-1]
    return torch.take_along_dim(x, order.view(shape), dim=dimension + 1)
