"""LAMB: layer-wise adaptive moments for large batches."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optim.checks import POSITIVE_OR_NONE, Range
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.rules.ops import lerp, minimum, norm, sqrt, where
from lightning_optim.rules.rule import Rule
from lightning_optim.stepping.common import Common
from lightning_optim.stepping.method import Group


def lamb(
    p: Any,
    g: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    *,
    lr: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    weight_decay: Any,
    max_weight_norm: Any,
    max_trust_ratio: Any,
    step: Any,
    adapt: bool,
) -> Any:
    """The rule of LAMB; without ``adapt`` it is Adam without decay."""
    exp_avg = lerp(exp_avg, g, 1 - beta1)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (g * g)
    denominator = sqrt(exp_avg_sq) * (1 / sqrt(1 - beta2**step)) + eps
    direction = (exp_avg * (1 / (1 - beta1**step))) / denominator
    if not adapt:
        return lr * direction, exp_avg, exp_avg_sq
    direction = direction + weight_decay * p
    weight_norm, direction_norm = norm(p), norm(direction)
    ratio = minimum(weight_norm, max_weight_norm) / direction_norm
    ratio = where(weight_norm > 0, where(direction_norm > 0, ratio, 1.0), 1.0)
    # In two factors: the ratio alone may overflow float32 for a tiny direction, and underflow for a huge one.
    root = sqrt(minimum(ratio, max_trust_ratio))
    return (lr * root) * (root * direction), exp_avg, exp_avg_sq


class LAMB(RuleOptimizer):
    r"""LAMB: Adam's direction, scaled for each tensor to the norm of its weights.

    .. math:: r = \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon} + \lambda\theta,
              \quad \theta \leftarrow \theta - \eta\, \frac{\|\theta\|}{\|r\|}\, r

    The ratio is 1 where either norm is 0. Biases and norm weights (tensors of at most one dimension) take no
    ratio and no decay. Other implementations clip the gradients' global norm to 1 by default; this one does so with
    ``max_grad_norm=1.0``.

    Args:
        params: Parameters, named parameters or param groups.
        lr: Learning rate, a number or a 0-dim tensor.
        betas: Decay rates of the two averages.
        eps: Added to the denominator.
        weight_decay: Decay coefficient, part of the direction that is scaled.
        max_weight_norm: Upper bound of the weight norm in the ratio; None: no bound.
        max_trust_ratio: Upper bound of the ratio; None: no bound.
        adapt_1d: Treat tensors of at most one dimension like all others.
        common: What all optimizers have in common: see :class:`~lightning_optim.stepping.common.Common`.

    Raises:
        ValueError: An option out of its range, or unknown.

    References:
        You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, arXiv:1904.00962.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, -4.0]]))
    >>> optimizer = LAMB([weight], lr=0.1)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight.detach()  # the norm is 5, that of the direction (1, -1) is the square root of 2
    tensor([[ 2.6464, -3.6464]])
    """

    paper = "arXiv:1904.00962"
    rule = Rule(lamb)
    ranges: ClassVar[dict[str, Range]] = {"max_weight_norm": POSITIVE_OR_NONE, "max_trust_ratio": POSITIVE_OR_NONE}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        max_weight_norm: float | None = None,
        max_trust_ratio: float | None = None,
        adapt_1d: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_weight_norm": max_weight_norm,
            "max_trust_ratio": max_trust_ratio,
            "adapt_1d": adapt_1d,
        }
        super().__init__(params, defaults, **common)

    @classmethod
    def flags(cls, group: Group, p: Tensor, fresh: bool) -> dict[str, bool]:
        """See :meth:`RuleOptimizer.flags`."""
        return {"adapt": p.ndim > 1 or group["adapt_1d"]}

    @classmethod
    def scalars(cls, group: Group) -> dict[str, float | Tensor]:
        """See :meth:`RuleOptimizer.scalars`; a bound of None becomes infinite."""
        bounds = {name: group[name] for name in ("max_weight_norm", "max_trust_ratio")}
        return super().scalars(group) | {name: math.inf if b is None else b for name, b in bounds.items()}
