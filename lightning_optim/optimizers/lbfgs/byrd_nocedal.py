"""The last few steps of a run and how the gradient changed in each: L-BFGS's inverse Hessian in compact form.

Nothing here knows parameters or an optimizer: it works on vectors on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.ambient import without_autocast

#: Elements of a block. Within one, products are summed in the history's own type, and the blocks' sums in float64.
#: At 2M weights and 100 pairs in float32, two cores, AVX-512: blocks of 4096 and 8192 take 54 ms for both passes' dot
#: products, as long as reading the history once does; 1024 and below take twice that. The error at 4096 is 2e-10 of
#: |s||g| (8192: 3e-10), and for products of one sign 1e-8 of the result, where torch.dot has 3e-7 and torch.mv 3e-6.
BLOCK = 4096

#: The smallest cosine between a step and its change of gradient at which a pair is kept: well above the error of the
#: dot products (see BLOCK), below which the sign of the curvature is not known.
MIN_COSINE = {torch.float32: 1e-6, torch.float64: 1e-10}

Vector = Tensor


class CompactHistory:
    r"""Pairs (s, y) in one slab of memory, and the direction -Hg that follows from them.

    With the k pairs as columns of S and Y, D = diag(SᵀY), and R the upper triangle of SᵀY (oldest first):

    .. math:: H g = \gamma g + S\, R^{-\top}\big((D + \gamma Y^\top Y)\, u - \gamma\, Y^\top g\big)
              - \gamma\, Y u, \qquad u = R^{-1} S^\top g

    Equal to the two-loop recursion, but with two passes over the history instead of four: one for all dot products,
    and one for the combination. R and YᵀY are kept in float64; a new pair's column of them comes from the same first
    pass as Sᵀg and Yᵀg, as a second right-hand side, and so costs no pass of its own.

    The slab is a ring: ``slab[block, 2 * slot]`` is a block of s, ``slab[block, 2 * slot + 1]`` of y.

    Args:
        elements: Length of the vectors.
        size: The most pairs that are kept, the newest ones.
        dtype: The type in which they are kept and multiplied: float32 or float64.

    References:
        Byrd, Nocedal and Schnabel, Representations of quasi-Newton matrices and their use in limited memory methods,
        Mathematical Programming 63, 1994, theorem 2.2.

    >>> history = CompactHistory(2, 5, torch.float64)
    >>> hessian = torch.tensor([2.0, 8.0], dtype=torch.float64)
    >>> for step in torch.eye(2, dtype=torch.float64):
    ...     history.add(history.vector(step), history.vector(step * hessian))
    >>> direction = history.vector()
    >>> history.direction(history.vector([2.0, 8.0]), 1.0, out=direction)
    >>> direction[:2]  # Newton's, from one step along each axis
    tensor([-1., -1.], dtype=torch.float64)
    """

    def __init__(self, elements: int, size: int, dtype: torch.dtype) -> None:
        self.elements, self.size, self.dtype = elements, size, dtype
        self.blocks, self.block = blocks_of(elements)
        # Zeros from the system cost nothing until they are written to, and the end of the last block stays zero.
        self.slab = torch.zeros(self.blocks, 2 * size, self.block, dtype=dtype, device="cpu")
        self.sy = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        self.yy = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        # The two right-hand sides: g, y.
        self._right = torch.zeros(self.blocks, 2, self.block, dtype=dtype, device="cpu")
        self._out = torch.empty(self.blocks, 1, self.block, dtype=dtype, device="cpu")
        self.clear()

    def clear(self) -> None:
        """Forget all pairs."""
        self.order: list[int] = []  # slots, the oldest first
        self.gamma = 1.0
        self.pending = False  # whether the newest pair's products are still to come, with the next direction's

    def __len__(self) -> int:
        return len(self.order)

    def vector(self, values: Any = None) -> Vector:
        """A new vector in the history's layout (zeros after the last element), in its type."""
        made = torch.zeros(self.blocks * self.block, dtype=self.dtype, device="cpu")
        if values is not None:
            made[: self.elements] = torch.as_tensor(values, dtype=self.dtype, device="cpu")
        return made

    def add(self, s: Vector, y: Vector) -> None:
        """Keep a pair, in place of the oldest if there are :attr:`size` already.

        Args:
            s: How the weights changed; in any floating type.
            y: How the gradient changed; the product with ``s`` must be positive (see :func:`cosine`).
        """
        if self.pending:
            self._products()
        kept = self.order[1:] if len(self.order) == self.size else self.order
        slot = self.order[0] if kept is not self.order else len(self.order)
        try:
            self.slab[:, 2 * slot].copy_(s.view(self.blocks, self.block))
            self.slab[:, 2 * slot + 1].copy_(y.view(self.blocks, self.block))
        except BaseException:  # an interrupt: the oldest pair may be half overwritten
            self.clear()
            raise
        self.order, self.pending = [*kept, slot], True

    @without_autocast
    def direction(self, gradient: Vector, first: float, *, out: Vector) -> None:
        """Write the direction -Hg.

        Args:
            gradient: g, in any floating type.
            first: The factor of the gradient while there are no pairs.
            out: The vector to which it is written.
        """
        if not self.order:
            torch.mul(gradient, -first, out=out)
            return
        self._right[:, 0].copy_(gradient.view(self.blocks, self.block))
        products = self._products()
        order = torch.tensor(self.order, dtype=torch.int64, device="cpu")
        ring = order.unsqueeze(1), order
        r, yy = self.sy[ring].triu(), self.yy[ring]
        p, q = products[0, 2 * order], products[0, 2 * order + 1]
        u = torch.linalg.solve_triangular(r, p.unsqueeze(1), upper=True)
        v = r.diagonal().unsqueeze(1) * u + self.gamma * (yy @ u - q.unsqueeze(1))
        w = torch.linalg.solve_triangular(r.T, v, upper=False)
        factors = torch.zeros(2 * len(self.order), dtype=torch.float64, device="cpu")
        factors[2 * order], factors[2 * order + 1] = -w.squeeze(1), self.gamma * u.squeeze(1)
        row = factors.to(self.dtype).expand(self.blocks, 1, -1)
        torch.bmm(row, self.slab[:, : 2 * len(self.order)], out=self._out)
        torch.add(self._out.view(-1), gradient, alpha=-self.gamma, out=out)

    @without_autocast
    def _products(self) -> Tensor:
        """Sᵀg, Yᵀg (interleaved, by slot) in the first row; with a pending pair, its column of SᵀY and YᵀY."""
        if self.pending:
            self._right[:, 1].copy_(self.slab[:, 2 * self.order[-1] + 1])
        used = self.slab[:, : 2 * len(self.order)]
        products = torch.bmm(self._right, used.transpose(1, 2)).sum(0, dtype=torch.float64)
        if self.pending:
            count, slot = len(self.order), self.order[-1]
            self.sy[:count, slot] = products[1, 0::2]
            self.yy[:count, slot] = self.yy[slot, :count] = products[1, 1::2]
            self.gamma = float(self.sy[slot, slot] / self.yy[slot, slot])
            self.pending = False
        return products

    # -- checkpoints --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The pairs, as tensors and primitives. The slab is not copied: a history may fill the memory."""
        return {
            "history": self.slab,
            "order": list(self.order),
            "sy": self.sy,
            "yy": self.yy,
            "gamma": self.gamma,
            "pending": self.pending,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load pairs: bit for bit from a history of the same size and type, else the newest that fit.

        Raises:
            ValueError: The pairs have vectors of another length, or are damaged; nothing is changed then.
        """
        missing = sorted(set(self.state_dict()) - set(state))
        if missing:
            raise ValueError(f"the history lacks {', '.join(missing)}")
        slab, order = state["history"], [int(slot) for slot in state["order"]]
        if not isinstance(slab, Tensor) or slab.ndim != 3 or slab.shape[::2] != self.slab.shape[::2]:
            shape = tuple(slab.shape) if isinstance(slab, Tensor) else type(slab).__name__
            raise ValueError(
                f"the history has shape {shape}, that of {self.elements} weights is ({self.blocks}, 2 * history_size, "
                f"{self.block})"
            )
        size = slab.shape[1] // 2
        full = sorted(order) == list(range(len(order))) and len(order) <= size
        if not full or any(getattr(state[name], "shape", None) != (size, size) for name in ("sy", "yy")):
            raise ValueError(f"the history is damaged: slots {order} of {size}")
        self.clear()
        if (size, slab.dtype) == (self.size, self.dtype):
            self.slab.copy_(slab)
            self.sy.copy_(state["sy"])
            self.yy.copy_(state["yy"])
            self.order, self.gamma, self.pending = order, float(state["gamma"]), bool(state["pending"])
            return
        for slot in order[-self.size :]:
            self.add(slab[:, 2 * slot].reshape(-1), slab[:, 2 * slot + 1].reshape(-1))


def blocks_of(elements: int) -> tuple[int, int]:
    """How a vector is divided: the number of blocks, and the elements of each (a multiple of 16).

    >>> blocks_of(5000), blocks_of(3)
    ((2, 2512), (1, 16))
    """
    blocks = max(1, -(-elements // BLOCK))
    return blocks, -(-max(1, -(-elements // blocks)) // 16) * 16


@without_autocast
def dot(a: Vector, b: Vector) -> float:
    """The product of two vectors in a history's layout: within a block in their type, over blocks in float64."""
    block = blocks_of_padded(a.numel())
    a, b = a.view(-1, 1, block), b.view(-1, block, 1)
    return float(torch.bmm(a, b).sum(dtype=torch.float64))


def blocks_of_padded(elements: int) -> int:
    """The number of elements of a block, for a vector that consists of whole blocks."""
    return elements // max(1, -(-elements // BLOCK))


def cosine(s: Vector, y: Vector) -> float:
    """The cosine of the angle between a step and its change of gradient; NaN if either is zero."""
    norms = (dot(s, s) * dot(y, y)) ** 0.5
    return dot(s, y) / norms if norms > 0 else float("nan")
