"""How a step asks for further evaluations of the loss: one protocol for SAM, line searches and curvature.

An optimizer says what it may ask for (:func:`request_of`) and whether its next step asks (:func:`asks`). The training
code answers with an :class:`Evaluator`: a strategy evaluates the window of the step again; a plain loop calls a
function that returns the loss (:class:`LossEvaluator`, which ``step(evaluate=...)`` makes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_optim.stepping.curvature import hessian_vector

#: What a step may ask for, by the name of the :class:`Evaluator`'s method that answers:
#:
#: - ``"gradient"``: another gradient, once, before the step, at weights that the optimizer has moved (SAM);
#: - ``"loss_and_gradient"``: loss and gradient in the step, as often as it wants, at weights that it chooses
#:   (line searches);
#: - ``"hessian_vector"``: products of the Hessian with directions, before the step, at the present weights (Sophia).
Request = Literal["gradient", "loss_and_gradient", "hessian_vector"]
REQUESTS: tuple[Request, ...] = get_args(Request)


class Evaluator(Protocol):
    """Evaluates the loss of a whole step again, at the weights as they are when it is called.

    Every evaluation is of the same function: the same batches and, where possible, the same noise.
    """

    @property
    def loss_scale(self) -> float | Tensor | None:
        """What the loss, and so the gradients in ``p.grad``, are multiplied by; None: by nothing."""

    def gradient(self) -> None:
        """Replace the gradients in ``p.grad``, with the loss scale in them."""

    def loss_and_gradient(self) -> Any:
        """Replace the gradients in ``p.grad``, without a loss scale, and return the loss."""

    def hessian_vector(self, directions: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The products of the loss's Hessian with a direction that has one part for each parameter, by parameter.

        The products have no loss scale in them, and are zeros where the gradient does not depend on the weights. The
        gradients in ``p.grad`` stay as they are.
        """


class Asking(Protocol):
    """An optimizer that asks for evaluations before its step."""

    @property
    def asks(self) -> bool:
        """Whether the next step asks for an evaluation."""

    def ask(self, evaluator: Evaluator) -> None:
        """Evaluate what the next step needs; called after the backward passes, before clipping and the step."""

    def abandon(self) -> None:
        """Forget what was evaluated for a step that does not take place."""


def request_of(optimizer: Optimizer) -> Request | None:
    """What an optimizer asks for in some of its steps; None if it steps by the gradient alone.

    Its attribute ``request`` says so. Without one, an optimizer with ``needs_closure = True``, or a
    ``torch.optim.LBFGS``, is taken to search along a line.

    >>> import lightning_optim
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> request_of(lightning_optim.LBFGS([weight])), request_of(torch.optim.SGD([weight]))
    ('loss_and_gradient', None)
    """
    declared = getattr(optimizer, "request", None)
    if isinstance(declared, str) and declared in REQUESTS:
        return declared
    searches = getattr(optimizer, "needs_closure", False) is True or isinstance(optimizer, LBFGS)
    return "loss_and_gradient" if searches else None


def asks(optimizer: Optimizer) -> bool:
    """Whether the next step of an optimizer asks for an evaluation.

    >>> import lightning_optim
    >>> asks(lightning_optim.LBFGS([torch.nn.Parameter(torch.ones(2))]))
    True
    """
    return request_of(optimizer) is not None and getattr(optimizer, "asks", True) is not False


class LossEvaluator:
    """Answers by calling a function that runs the forward passes of a step and returns the loss.

    Args:
        optimizer: The optimizer whose gradients are zeroed before each new evaluation.
        evaluate: Returns the loss without calling ``backward()``; with gradient accumulation, that of all batches.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> evaluator = LossEvaluator(torch.optim.SGD([weight]), lambda: (weight**3).sum())
    >>> evaluator.hessian_vector({weight: torch.ones(2)})[weight]
    tensor([ 6., 12.])
    """

    loss_scale = None

    def __init__(self, optimizer: Optimizer, evaluate: Callable[[], Any]) -> None:
        self._optimizer, self._evaluate = optimizer, evaluate

    def gradient(self) -> None:
        """See :meth:`Evaluator.gradient`."""
        self.loss_and_gradient()

    def loss_and_gradient(self) -> Tensor:
        """See :meth:`Evaluator.loss_and_gradient`."""
        self._optimizer.zero_grad()
        loss = self._loss()
        loss.backward()
        return loss.detach()

    def hessian_vector(self, directions: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """See :meth:`Evaluator.hessian_vector`."""
        return hessian_vector(self._loss(), directions)

    def _loss(self) -> Tensor:
        with torch.enable_grad():
            loss = self._evaluate()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            if isinstance(loss, Tensor) and loss.numel() == 1:
                found = "a loss without a graph"
            raise TypeError(
                f"evaluate returned {found}; valid: the loss itself, one number that depends on the weights, as a "
                "tensor that backward() was not called of"
            )
        return loss


class ClosureEvaluator:
    """Answers by a closure that runs forward and backward.

    Args:
        optimizer: The optimizer whose gradients are zeroed before each new evaluation.
        closure: As in ``optimizer.step(closure)``.
    """

    loss_scale = None

    def __init__(self, optimizer: Optimizer, closure: Callable[[], Any]) -> None:
        self._optimizer, self._closure = optimizer, closure

    def gradient(self) -> None:
        """See :meth:`Evaluator.gradient`. There must be gradients already.

        Raises:
            RuntimeError: The closure computes no gradients.
        """
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        came: list[Tensor] = []
        seen = next(p for p in params if p.grad is not None).register_hook(came.append)
        try:
            self.loss_and_gradient()
        finally:
            seen.remove()
        # A closure that computed gradients, and dropped them, is no error.
        if not came and all(p.grad is None for p in params):
            raise RuntimeError(
                f"{type(self._optimizer).__name__}: the closure computed no gradients when it was called a second "
                "time; valid: a closure that runs forward and backward at each call, step(evaluate=...), which returns "
                "the loss, or perturb() and restore() around a second pass, then step()"
            )

    def loss_and_gradient(self) -> Any:
        """See :meth:`Evaluator.loss_and_gradient`."""
        self._optimizer.zero_grad()
        with torch.enable_grad():
            return self._closure()

    def hessian_vector(self, directions: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """See :meth:`Evaluator.hessian_vector`; a closure cannot answer, since its ``backward()`` frees the graph.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            f"{type(self._optimizer).__name__}: step(closure), where a second derivative is needed, which needs the "
            "graph that the closure's backward() frees; valid: step(evaluate=...), which returns the loss"
        )
