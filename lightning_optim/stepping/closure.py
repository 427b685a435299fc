"""Optimizers that evaluate the model several times in a step."""

from __future__ import annotations

from typing import ClassVar

import torch

from lightning_optim.stepping.evaluations import Request


class ClosureOptimizer(torch.optim.Optimizer):
    """An optimizer whose step needs the loss at further weights than those at which it is called.

    Its ``step(closure)`` calls the closure any number of times. Every call must evaluate the *whole* loss of the step
    at the weights as they are then (with gradient accumulation: all of the window's batches), leave its gradient,
    unscaled and not clipped, in ``p.grad``, and return the loss. It must be the same function each time, so that
    differences are due to the weights. If several processes share the weights, the returned loss must be the same on
    all of them (their mean), or each would decide for itself.

    A strategy that finds :attr:`needs_closure` on an optimizer passes it a closure that does all this.

    >>> import lightning_optim
    >>> lightning_optim.LBFGS([torch.nn.Parameter(torch.ones(2))]).needs_closure
    True
    """

    #: See :mod:`lightning_optim.stepping.evaluations`.
    request: ClassVar[Request] = "loss_and_gradient"
    #: Whether ``step`` must be given a closure that can be called again.
    needs_closure: ClassVar[bool] = True

    @classmethod
    def public_name(cls) -> str:
        """The name under which users know the class (``LBFGS`` for ``LBFGSOptim``)."""
        return cls.__name__.removesuffix("Optim")
