"""RAdam: Adam whose first steps are without an adaptive learning rate, until its variance is known."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optim.known_as import known_as
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.rules.ops import lerp, sqrt, where
from lightning_optim.rules.policy import Decay
from lightning_optim.rules.rule import Rule
from lightning_optim.stepping.common import Common

#: The length of the average from which on the variance is taken to be known. The paper says 4, torch and the authors'
#: code 5.
_KNOWN_FROM = 5.0


def radam(
    p: Any, g: Any, exp_avg: Any, exp_avg_sq: Any, *, lr: Any, beta1: Any, beta2: Any, eps: Any, step: Any
) -> Any:
    """The rule of RAdam."""
    exp_avg = lerp(exp_avg, g, 1 - beta1)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (g * g)
    correction = 1 - beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / correction
    rectified = sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    adaptive = rectified * sqrt(correction) / (sqrt(exp_avg_sq) + eps)
    return lr / (1 - beta1**step) * (exp_avg * where(length > _KNOWN_FROM, adaptive, 1.0)), exp_avg, exp_avg_sq


@known_as("RAdam")
class RAdamOptim(RuleOptimizer):
    r"""RAdam: Adam with a rectified adaptive learning rate, which needs no warmup.

    .. math:: \theta \leftarrow \theta - \eta\,\hat m \cdot
              \begin{cases} r_t / (\sqrt{\hat v} + \epsilon) & \rho_t > 5 \\ 1 & \text{else} \end{cases}

    :math:`\rho_t` is the length of the average of squares so far, and :math:`r_t` corrects for its variance. The first
    steps are those of SGD with momentum. This class and ``torch.optim.RAdam`` can load each other's state.

    Args:
        params: Parameters, named parameters or param groups.
        lr: Learning rate, a number or a 0-dim tensor.
        betas: Decay rates of the two averages.
        eps: Added to the denominator.
        weight_decay: Decay coefficient; ``weight_decay * p`` is added to the gradient (L2).
        decoupled_weight_decay: True shrinks the weights by ``lr * weight_decay`` of themselves instead.
        common: What all optimizers have in common: see :class:`~lightning_optim.stepping.common.Common`.

    Raises:
        ValueError: An option out of its range, or unknown.

    References:
        Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, arXiv:1908.03265.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = RAdamOptim([weight], lr=0.01)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight.detach()  # lr times the gradient
    tensor([ 0.9800, -1.9600])
    """

    paper = "arXiv:1908.03265"
    torch_equivalent = torch.optim.RAdam
    rule = Rule(radam)
    default_decay: ClassVar[Decay] = "l2"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **common)
