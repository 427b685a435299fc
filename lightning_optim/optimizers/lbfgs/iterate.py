"""All weights of an optimizer as one vector in host memory, wherever and in whatever type they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy as is_uninitialized

from lightning_optim.engines.memory import is_lazy
from lightning_optim.optimizers.lbfgs.byrd_nocedal import Vector, blocks_of
from lightning_optim.stepping.places import owners
from lightning_optim.stepping.shards import is_distributed

#: What a layout depends on: for each param group, the number of real elements and the type of each of its parameters.
Signature = tuple[tuple[tuple[int, torch.dtype], ...], ...]


def trained(group: dict[str, Any]) -> list[Tensor]:
    """The parameters of a group that are trained: those that are not frozen, not empty, and initialized."""
    return [p for p in group["params"] if p.requires_grad and not is_uninitialized(p) and p.numel() > 0]


def signature(groups: Iterable[dict[str, Any]]) -> Signature:
    """The layout that these param groups have now."""
    return tuple(tuple((_real_numel(p), p.dtype) for p in trained(group)) for group in groups)


def count(layout: Signature) -> int:
    """The number of real elements of all parameters.

    >>> count(signature([{"params": [torch.ones(3, requires_grad=True), torch.ones(9)]}]))
    3
    """
    return sum(elements for group in layout for elements, _ in group)


def is_wide(layout: Signature) -> bool:
    """Whether some parameter has more precision than float32."""
    return any(dtype in (torch.float64, torch.complex128) for group in layout for _, dtype in group)


class Iterate:
    """The weights as a vector x, a direction from it, and moves along this direction.

    x is a master copy in float32 or float64, and the parameters are x rounded to their types: weights that someone else
    has changed are copied to x by :meth:`read`. It holds no parameters, which sharding and loading may replace, so all
    methods are given the param groups.

    Parameters that are the same memory are one variable: the first one, with the sum of their gradients. The parts of
    the others stay zero.

    Args:
        layout: The layout of the param groups.
        dtype: The type of the vectors.
    """

    def __init__(self, layout: Signature, dtype: torch.dtype) -> None:
        self.layout, self.dtype = layout, dtype
        blocks, block = blocks_of(count(layout))
        self.x, self.direction = (torch.zeros(blocks * block, dtype=dtype, device="cpu") for _ in range(2))
        starts, start = [], 0
        for group in layout:
            starts.append(start)
            start += sum(elements for elements, _ in group)
        self._owners: list[int] = []  # for each parameter, the index of its variable in this step
        self.bounds = [slice(a, b) for a, b in zip(starts, [*starts[1:], start], strict=True)]

    def vector(self) -> Vector:
        """Zeros of the same length and type."""
        return torch.zeros_like(self.x)

    def read(self, groups: Sequence[dict[str, Any]], name: str = "") -> bool:
        """Copy weights to x that are not x rounded; returns whether there were any.

        Args:
            groups: Param groups.
            name: The optimizer's name, for messages.

        Raises:
            ValueError: Parameters share memory in part.
        """
        self._owners = owners(name, [p for group in groups for p in trained(group)])
        changed = False
        for p, part in self._parts(groups):
            now, x = _flat(p), self.x[part]
            if not torch.equal(x.to(now.dtype), now.cpu()):
                x.copy_(now)
                changed = True
        return changed

    def go(self, groups: Sequence[dict[str, Any]], t: float) -> None:
        """Set the parameters to x + t · direction; for 0, exactly to what they were."""
        for p, part in self._parts(groups):
            x, target = self.x[part], p.detach()
            plain = target.dtype == x.dtype and target.device == x.device and not is_lazy(target)
            if t != 0 and plain and target.is_contiguous():
                torch.add(x, self.direction[part], alpha=t, out=target.view(-1))
            else:
                _write(target, x if t == 0 else torch.add(x, self.direction[part], alpha=t))

    def displacement(self, groups: Sequence[dict[str, Any]], out: Vector) -> None:
        """Write how far the parameters are from x rounded to their types.

        A low-precision weight follows x in steps of its own; the change of the gradient belongs to these steps.
        """
        for p, part, owner in self._all_parts(groups):
            if owner is not part:
                out[part].zero_()
                continue
            now, x = _flat(p), self.x[part]
            torch.sub(now.to(self.x), x.to(now.dtype).to(x.dtype), out=out[part])

    def moves(self, groups: Sequence[dict[str, Any]], t: float) -> bool:
        """Whether x + t · direction is not x."""
        parts = [part for _, part in self._parts(groups)]
        return any(not torch.equal(torch.add(self.x[i], self.direction[i], alpha=t), self.x[i]) for i in parts)

    def accept(self, groups: Sequence[dict[str, Any]], t: float) -> None:
        """Make the point to which :meth:`go` went the new x; the direction is overwritten."""
        for _, part in self._parts(groups):  # in the same parts, so that x is bit for bit what was written then
            torch.add(self.x[part], self.direction[part], alpha=t, out=self.direction[part])
        # At once: after an interrupt x is either the old point or the new one.
        self.x, self.direction = self.direction, self.x

    def gradient(self, groups: Sequence[dict[str, Any]], out: Vector) -> None:
        """Collect the gradients; zero for parameters without one."""
        for p, part, owner in self._all_parts(groups):
            grad = None if p.grad is None else _flat(p.grad.to_dense() if p.grad.layout != torch.strided else p.grad)
            if owner is not part:
                out[part].zero_()
                if grad is not None:
                    out[owner].add_(grad.to(out))
            elif grad is None:
                out[part].zero_()
            else:
                out[part].copy_(grad)

    def decay(self, groups: Sequence[dict[str, Any]], gradient: Vector) -> float:
        """Add the gradient of each group's weight_decay / 2 · |weights|² to ``gradient``; returns the terms' sum."""
        if not any(group["weight_decay"] for group in groups):
            return 0.0
        factors = [float(group["weight_decay"]) for group in groups for _ in trained(group)]
        total = 0.0
        for factor, (p, _, owner) in zip(factors, self._all_parts(groups), strict=True):
            weights = _flat(p).to(self.x)
            gradient[owner].add_(weights, alpha=factor)
            total += factor / 2 * float(torch.linalg.vector_norm(weights, dtype=torch.float64)) ** 2
        return total

    def masters(self, groups: Sequence[dict[str, Any]]) -> dict[int, Tensor]:
        """The parts of x whose parameters have another type, by the parameters' numbers in a state_dict."""
        numbers = {id(p): i for i, p in enumerate(p for group in groups for p in group["params"])}
        return {numbers[id(p)]: self.x[part].clone() for p, part in self._parts(groups) if _flat(p).dtype != self.dtype}

    def load_masters(self, groups: Sequence[dict[str, Any]], masters: dict[int, Tensor]) -> None:
        """Load such parts of x; where they do not round to the weights, :meth:`read` will replace them."""
        numbers = {id(p): i for i, p in enumerate(p for group in groups for p in group["params"])}
        for p, part in self._parts(groups):
            if numbers[id(p)] in masters:
                self.x[part].copy_(masters[numbers[id(p)]].reshape(-1))

    def _parts(self, groups: Sequence[dict[str, Any]]) -> Iterable[tuple[Tensor, slice]]:
        """Each variable, with its part of x."""
        return ((p, part) for p, part, owner in self._all_parts(groups) if owner is part)

    def _all_parts(self, groups: Sequence[dict[str, Any]]) -> Iterable[tuple[Tensor, slice, slice]]:
        """Each parameter, with its part of x and that of its variable."""
        parts: list[slice] = []
        start = 0
        for group in groups:
            for p in trained(group):
                part = slice(start, start + _real_numel(p))
                number = len(parts)
                parts.append(part)
                yield p, part, parts[self._owners[number]] if self._owners else part
                start = part.stop


def refuse_unsuitable(name: str, group: dict[str, Any]) -> None:
    """Check the parameters of a param group.

    Raises:
        TypeError: A parameter is not floating-point or complex.
        ValueError: A parameter is there twice, or is divided over processes.
    """
    seen: set[int] = set()
    for index, p in enumerate(group["params"]):
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(
                f"{name}: parameter {index} of the group has dtype {p.dtype}; valid: floating-point or complex"
            )
        if is_distributed(p):
            raise ValueError(
                f"{name}: parameter {index} of the group is a DTensor, divided over processes; valid: whole parameters "
                "(one device, or DDP)"
            )
        if id(p) in seen:
            raise ValueError(f"{name}: parameter {index} of the group appears twice in it; pass each parameter once")
        seen.add(id(p))


def _real_numel(p: Tensor) -> int:
    return p.numel() * (2 if p.is_complex() else 1)


def _flat(tensor: Tensor) -> Tensor:
    """A tensor's elements in a row, real and imaginary parts side by side."""
    tensor = tensor.detach()
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).reshape(-1)


def _write(target: Tensor, values: Tensor) -> None:
    if not target.is_complex():
        target.copy_(values.view(target.shape))
    elif is_lazy(target):
        target.copy_(torch.view_as_complex(values.clone().view(*target.shape, 2)))
    else:
        torch.view_as_real(target).copy_(values.view(*target.shape, 2))
