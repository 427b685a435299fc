"""Sophia: momentum over an estimate of the Hessian's diagonal, clipped element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optim.checks import POSITIVE_FINITE, Range, check_choice, whole
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.rules.ops import clip, lerp, maximum, mean, sign, where
from lightning_optim.rules.rule import Rule, Step
from lightning_optim.stepping.asking import AsksForInputs, Due
from lightning_optim.stepping.common import Common
from lightning_optim.stepping.curvature import hutchinson, normal_direction
from lightning_optim.stepping.evaluations import Evaluator, Request
from lightning_optim.stepping.method import Inputs

#: The largest float32. An element of an estimate above it, or NaN, is ignored: an overflow of float16, for example.
LARGEST = torch.finfo(torch.float32).max


def sophia(
    p: Any,
    g: Any,
    exp_avg: Any,
    hessian: Any,
    estimate: Any = None,
    *,
    lr: Any,
    beta1: Any,
    beta2: Any,
    gamma: Any,
    eps: Any,
    refresh: bool,
) -> Any:
    """The rule of Sophia. Where an estimate is not finite, the average of estimates stays as it is."""
    exp_avg = lerp(exp_avg, g, 1 - beta1)
    if refresh:
        hessian = where(abs(estimate) <= LARGEST, lerp(hessian, estimate, 1 - beta2), hessian)
    ratio = exp_avg / maximum(gamma * hessian, eps)
    unclipped = mean(maximum(sign(1 - abs(ratio)), 0.0))
    return Step(lr, clip(ratio, -1, 1), observe={"unclipped": unclipped}), exp_avg, hessian


def _hutchinson(due: list[Due], evaluator: Evaluator) -> dict[Tensor, Tensor]:
    directions = {one.param: normal_direction(one.param, one.number, one.updates) for one in due}
    return hutchinson(directions, evaluator.hessian_vector)


#: The estimators of the Hessian's diagonal by name, each with the evaluation that it asks for.
ESTIMATORS: dict[str, tuple[Request, Callable[[list[Due], Evaluator], dict[Tensor, Tensor]]]] = {
    "hutchinson": ("hessian_vector", _hutchinson),
}


class Sophia(AsksForInputs, RuleOptimizer):
    r"""Sophia: momentum divided by an estimate of the Hessian's diagonal, each element clipped to ``lr``.

    .. math:: m \leftarrow \beta_1 m + (1-\beta_1) g, \qquad
              \theta \leftarrow (1-\eta\lambda)\,\theta - \eta\,
              \mathrm{clip}\big(m / \max(\gamma h, \epsilon),\ \pm 1\big)

    and at the first step and every ``update_interval``-th after it, before that,

    .. math:: h \leftarrow \beta_2 h + (1-\beta_2)\,\hat h, \qquad \hat h = u \odot \nabla^2 L\,u,
              \quad u \sim N(0, I) \quad \text{(Hutchinson)}

    Where the loss curves upwards, the step is Newton's; where the estimate is small or negative, it is that of signed
    momentum. At the first steps :math:`h` is a small part of the first estimate, so nearly all elements are clipped.
    Choose ``gamma`` such that a share of .1 to .5 of the elements is not (the rule observes it as ``unclipped``).

    The Hessian's product takes a forward pass and two backward passes, and the memory of the first one's graph. The
    training code evaluates it (see :mod:`lightning_optim.stepping.evaluations`):

    - a Lightning Trainer with ``strategy="in_graph"`` or ``"in_graph_ddp"`` does it by itself, over the whole
      accumulation window;
    - a loop of your own calls ``step(evaluate=...)``.

    Where an estimate is not finite (float16 may overflow), :math:`h` stays as it is. The directions depend on the
    number of the step and of the parameter alone: a run that is resumed goes on with the same ones.

    Args:
        params: Parameters, named parameters or param groups.
        lr: Learning rate, a number or a 0-dim tensor: no element moves by more.
        betas: Decay rates of the momentum, and of the average of estimates (per estimate, not per step).
        gamma: Factor of the estimate: smaller clips more. The paper has 0.01 for this estimator.
        weight_decay: Decay coefficient; the weights shrink by ``lr * weight_decay`` of themselves each step.
        hessian: What estimates the Hessian's diagonal: ``"hutchinson"``.
        update_interval: Steps from one estimate to the next.
        eps: The least denominator.
        common: See :class:`~lightning_optim.stepping.common.Common`; estimates are not clipped.

    Raises:
        ValueError: An option out of its range, or unknown.

    References:
        Liu et al., Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training,
        arXiv:2305.14342, algorithms 1 and 3. Their code's class for this estimator also divides the clipped step by
        ``1 - beta1**t``, by which the first steps are up to 28 times as long; the paper does not.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = Sophia([weight], lr=0.01, weight_decay=0.0)
    >>> weight.square().sum().backward()
    >>> optimizer.step(evaluate=lambda: weight.square().sum())  # called where `optimizer.asks`
    >>> weight.detach(), optimizer.asks
    (tensor([ 0.9900, -1.9900]), False)
    """

    rule = Rule(sophia, inputs={"estimate": "refresh"}, every={"refresh": "update_interval"}, observe=("unclipped",))
    paper = "arXiv:2305.14342"
    request: ClassVar[Request] = "hessian_vector"
    ranges: ClassVar[dict[str, Range]] = {
        "gamma": POSITIVE_FINITE,
        "update_interval": whole(1),
        "eps": POSITIVE_FINITE,  # the denominator of a weight whose estimate is 0
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        gamma: float = 0.01,
        weight_decay: float = 0.1,
        *,
        hessian: str = "hutchinson",
        update_interval: int = 10,
        eps: float = 1e-12,
        **common: Unpack[Common],
    ) -> None:
        self.given = {"hessian": check_choice("Sophia", "hessian", hessian, ESTIMATORS)}
        defaults = {
            "lr": lr,
            "betas": betas,
            "gamma": gamma,
            "weight_decay": weight_decay,
            "update_interval": update_interval,
            "eps": eps,
        }
        super().__init__(params, defaults, **common)

    def evaluated(self, due: list[Due], evaluator: Evaluator) -> Inputs:
        """Estimates of the Hessian's diagonal; with ``maximize``, of the negated loss."""
        _, estimator = ESTIMATORS[self.given["hessian"]]
        estimates = estimator(due, evaluator)
        for one in due:
            if one.group["maximize"]:
                estimates[one.param].neg_()
        return {"estimate": estimates}
