"""The first half of a step of SAM: from the weights to the worst place nearby."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_optim.stepping.shards import (
    LocalSquares,
    is_distributed,
    local,
    same_parts,
    shards_of,
    total_squares,
)

#: Names of SAM's options in param groups. Not ``rho``, which Adadelta and Sophia have too.
RHO, ADAPTIVE = "sam_rho", "sam_adaptive"

#: Added to the norm of the gradient, as in SAM's own code.
EPS = 1e-12
#: Added to a weight's size by ASAM, as in its authors' code.
ETA = 0.01


@dataclass(frozen=True)
class _Slope:
    """A parameter with a gradient.

    Attributes:
        param: The parameter.
        rho: Length of the perturbation of all parameters together.
        grad: This process's part of the gradient.
        adaptive: Whether the factor T of the gradient is the size of the weights (ASAM) rather than 1.
    """

    param: Tensor
    rho: float
    grad: Tensor
    adaptive: bool

    @property
    def weight(self) -> Tensor:
        """This process's part of the parameter."""
        return local(self.param)

    def scaled(self, weight: Tensor, times: int) -> Tensor:
        """The gradient times T of a weight, or times T² with ``times=2``, in float32 (float64 for float64 weights)."""
        grad = self.grad.to(torch.promote_types(weight.dtype, torch.float32))
        if not self.adaptive:
            return grad
        size = weight.abs().to(grad.dtype.to_real()).add_(ETA)
        return grad * (size if times == 1 else size.square_())


class Ascent:
    """How far SAM's step has come, and the old weights.

    It is an object of its own that is only changed, never replaced: Lightning's wrapper of an optimizer reads the
    optimizer's attributes, but attributes that are set on the wrapper do not reach the optimizer.

    Attributes:
        perturbed: Whether weights are perturbed now.
        done: Whether the gradients are those at the perturbed weights, ready for the base optimizer's step.
    """

    def __init__(self) -> None:
        self.perturbed = self.done = False
        self._old: list[tuple[Tensor, Tensor]] = []

    def ascend(self, groups: Iterable[dict[str, Any]], loss_scale: float | Tensor | None) -> None:
        """Move weights along their gradients, to a distance of ``sam_rho`` from where they are.

        If any gradient is not finite, they stay. Nothing is read back from the device. If an exception is raised, the
        weights are where they were.

        Args:
            groups: Param groups, with SAM's options.
            loss_scale: What the gradients were multiplied by, if they were.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        slopes = list(_slopes(groups))
        factor = _factor(slopes, loss_scale) if slopes else None
        # All weights are copied before any is moved, so that the copies of weights that share memory are right.
        self._old = [(slope.param, slope.weight.clone()) for slope in slopes]
        self.perturbed, self.done = True, False
        try:
            if factor is not None:
                _move(slopes, [old for _, old in self._old], factor)
        except BaseException:  # out of memory, or an interrupt
            self.abandon()
            raise

    def descend(self) -> None:
        """Put the weights back, bit for bit."""
        try:
            self._put_back()
        except BaseException:  # an interrupt: weights must not be left in between
            self._put_back()
            raise

    def abandon(self) -> None:
        """Forget a step that was begun; weights that are perturbed are put back."""
        if self.perturbed:
            self.descend()
        self.done = False

    def _put_back(self) -> None:
        for p, old in self._old:
            local(p).copy_(old)
        self._old.clear()
        self.perturbed, self.done = False, True


def _move(slopes: Iterable[_Slope], old: Iterable[Tensor], factor: Tensor) -> None:
    factors: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for slope, before in zip(slopes, old, strict=True):
        direction = slope.scaled(before, times=2)
        key = (before.device, direction.dtype.to_real())
        if key not in factors:
            factors[key] = factor.to(key[0], non_blocking=True).to(key[1])
        move = direction * (factors[key] * slope.rho)
        # If some gradient is not finite, the factor is zero, and zero times infinity is NaN.
        (torch.view_as_real(move) if move.is_complex() else move).nan_to_num_(0.0, 0.0, 0.0)
        slope.weight.add_(move)


def _slopes(groups: Iterable[dict[str, Any]]) -> Iterator[_Slope]:
    for group in groups:
        names = group.get("param_names")
        if group[ADAPTIVE] and names and len(names) != len(group["params"]):
            raise RuntimeError(
                f"SAM: a group has {len(group['params'])} parameters and {len(names)} param_names, by which ASAM knows "
                "biases; valid: a name for each, or none"
            )
        for index, p in enumerate(group["params"]):
            grad = p.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"SAM: the gradient of parameter {index} of a group, of shape {tuple(p.shape)}, is sparse "
                    f"({grad.layout}); valid: dense gradients"
                )
            if is_distributed(p) and is_distributed(grad) and not same_parts(p, grad):
                grad = grad.redistribute(p.device_mesh, p.placements)
            adaptive = group[ADAPTIVE] and not _is_bias(p, names[index] if names else None)
            # Memory of lazily conjugated or negated gradients holds other numbers.
            yield _Slope(p, group[RHO], local(grad).resolve_conj().resolve_neg(), adaptive)


def _is_bias(p: Tensor, name: str | None) -> bool:
    return "bias" in name.rpartition(".")[2] if name is not None else p.ndim < 2


def _factor(slopes: Iterable[_Slope], loss_scale: float | Tensor | None) -> Tensor:
    """The factor by which all scaled gradients together get a norm of 1; 0 if their norm is not finite."""
    squares: LocalSquares = {}
    for slope in slopes:
        part = slope.scaled(slope.weight, times=1)
        part = torch.view_as_real(part) if part.is_complex() else part
        # Squares of float32 gradients under a loss scale of 65536 would overflow in float32; Metal has no float64.
        exact = torch.float32 if part.device.type == "mps" else torch.float64
        square = torch.linalg.vector_norm(part, dtype=exact).square().reshape(1)
        shards = shards_of(slope.param) if is_distributed(slope.param) else ()
        squares.setdefault(shards, []).append(square)
    norm = total_squares(squares).sum().sqrt()
    scale = 1.0 if loss_scale is None else loss_scale
    if isinstance(scale, Tensor):
        scale = scale.detach().reshape(()).to(norm.device, norm.dtype, non_blocking=True)
    return torch.where(norm.isfinite(), 1 / ((norm / scale + EPS) * scale), 0.0)
