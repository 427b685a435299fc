"""Lion: evolved sign momentum."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.rules.ops import lerp, sign
from lightning_optim.rules.rule import Rule
from lightning_optim.stepping.common import Common


def lion(p: Any, g: Any, exp_avg: Any, *, lr: Any, beta1: Any, beta2: Any) -> Any:
    """The rule of Lion: one average, used with beta1, kept with beta2."""
    return lr * sign(lerp(exp_avg, g, 1 - beta1)), lerp(exp_avg, g, 1 - beta2)


class Lion(RuleOptimizer):
    r"""Lion: the sign of an interpolation between momentum and gradient.

    .. math:: \theta \leftarrow (1-\eta\lambda)\,\theta - \eta\,\mathrm{sign}(\beta_1 m + (1-\beta_1) g),
              \quad m \leftarrow \beta_2 m + (1-\beta_2) g

    Every element moves by ``lr``, so take a 3 to 10 times smaller ``lr`` than for AdamW, and a ``weight_decay`` as
    many times larger. Half of AdamW's state.

    Args:
        params: Parameters, named parameters or param groups.
        lr: Learning rate, a number or a 0-dim tensor.
        betas: Interpolation factor of the update, and decay rate of the momentum.
        weight_decay: Decay coefficient; the weights shrink by ``lr * weight_decay`` of themselves each step.
        decoupled_weight_decay: False adds ``weight_decay * p`` to the gradient instead (L2).
        common: What all optimizers have in common: see :class:`~lightning_optim.stepping.common.Common`.

    Raises:
        ValueError: An option out of its range, or unknown.

    References:
        Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = Lion([weight], lr=0.01)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight.detach()
    tensor([ 0.9900, -1.9900])
    """

    paper = "arXiv:2302.06675"
    rule = Rule(lion)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = True,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **common)
