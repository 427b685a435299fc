"""What the tests share: an optimizer that asks for products of the Hessian, and the Hessian itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.stepping.curvature import normal_direction
from lightning_optim.stepping.evaluations import Evaluator

CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


class Curious(torch.optim.SGD):
    """Gradient descent that asks for products at every second step, and notes them."""

    request = "hessian_vector"

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr=lr)
        self.steps = 0
        self.found: list[list[Tensor]] = []
        self.register_step_post_hook(lambda *_: setattr(self, "steps", self.steps + 1))

    @property
    def asks(self) -> bool:
        return self.steps % 2 == 0

    def ask(self, evaluator: Evaluator) -> None:
        params: list[Tensor] = self.param_groups[0]["params"]
        before = [None if p.grad is None else p.grad.clone() for p in params]
        products = evaluator.hessian_vector(directions(params, self.steps))
        for p, grad in zip(params, before, strict=True):
            assert grad is p.grad is None or (grad is not None and p.grad is not None and torch.equal(grad, p.grad))
        self.found.append([products[p].clone() for p in params])

    def abandon(self) -> None:
        """It keeps nothing for a step."""


def directions(params: Sequence[Tensor], step: int) -> dict[Tensor, Tensor]:
    return {p: normal_direction(p, number, step) for number, p in enumerate(params)}


def by_matrix(loss_of: Callable[..., Tensor], params: Sequence[Tensor], u: Mapping[Tensor, Tensor]) -> list[Tensor]:
    """The products, by a Hessian that is written out.

    Args:
        loss_of: The loss as a function of the parameters.
        params: Their values.
        u: The direction.
    """
    values = tuple(p.detach() for p in params)
    blocks: Any = torch.autograd.functional.hessian(loss_of, values)
    return [
        sum(
            (block.reshape(p.numel(), q.numel()) @ u[q].reshape(-1) for block, q in zip(row, params, strict=True)),
            torch.zeros(p.numel(), dtype=p.dtype),
        ).view(p.shape)
        for p, row in zip(params, blocks, strict=True)
    ]
