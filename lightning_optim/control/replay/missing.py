"""Gradients that are dropped between the backward passes of a window, and so must be dropped in a replay as well."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

import torch
from torch import Tensor

from lightning_optim.stepping.shards import LocalSquares, is_distributed, local, shards_of, total_squares

#: For each parameter, its gradient's identity and version counter; None if it has no gradient.
Marks = list[tuple[int, int] | None]


def marks_of(params: Iterable[Tensor]) -> Marks:
    """Marks of the present gradients, which tell later whether gradients were changed."""
    return [None if p.grad is None else (id(p.grad), p.grad._version) for p in params]


class Missing:
    """Which gradients are missing at one place of a window.

    A gradient is missing if it is None, as ``zero_grad()`` leaves it. All are missing if gradients were written to
    since the last backward pass and all of them are zero now, as ``zero_grad(set_to_none=False)`` leaves them. (The
    answer stays on the device. Gradients that were zero anyway are zero in a replay too, as nothing perturbed weights.)

    Args:
        params: The parameters.
        marks: The result of :func:`marks_of` after the last backward pass.

    Attributes:
        everything: Whether there is no gradient at all, as far as the host knows.
        touched: Whether gradients were written to, or replaced, since ``marks``.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> missing = Missing([weight], [None])
    >>> weight.sum().backward()
    >>> missing.drop()
    >>> missing.everything, weight.grad
    (True, None)
    """

    def __init__(self, params: Iterable[Tensor], marks: Marks) -> None:
        self._params = list(params)
        now = marks_of(self._params)
        self._absent = [p for p, mark in zip(self._params, now, strict=True) if mark is None]
        self.everything = len(self._absent) == len(self._params)
        known = set(marks)
        self.touched = any(mark is not None and mark not in known for mark in now)
        self._left = _any_nonzero(self._params) if self.touched else None

    @torch.no_grad()
    def drop(self, held: MutableMapping[Tensor, Tensor] | None = None) -> None:
        """Drop the gradients that are missing.

        Args:
            held: The sums to drop from, by parameter; default: the parameters' gradients.
        """
        for p in self._absent:
            if held is None:
                p.grad = None
            else:
                held.pop(p, None)
        if self._left is None:
            return
        for p in self._params:
            if (found := p.grad if held is None else held.get(p)) is not None:
                part = local(found)
                part.masked_fill_(~self._left.to(part.device, non_blocking=True), 0)

    def kept(self, loss: Tensor | None) -> Tensor | None:
        """The loss of the evaluations so far, if anything is left of their gradients; else None, or a zero."""
        if loss is None or self.everything:
            return None
        return loss if self._left is None else torch.where(self._left.to(loss.device), loss, 0)


def _any_nonzero(params: list[Tensor]) -> Tensor | None:
    """Whether any element of any gradient is not zero (NaN is not); None if one is sparse."""
    squares: LocalSquares = {}
    for p in params:
        if p.grad is None:
            continue
        grad = local(p.grad)
        if grad.layout is not torch.strided:
            return None
        shards = shards_of(p.grad) if is_distributed(p.grad) else ()
        squares.setdefault(shards, []).append((grad != 0).any().float().reshape(1))
    return total_squares(squares).sum() != 0
