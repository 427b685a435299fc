"""Adam: adaptive moment estimation."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optim.known_as import known_as
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.rules.ops import lerp, maximum, sqrt
from lightning_optim.rules.policy import Decay
from lightning_optim.rules.rule import Rule
from lightning_optim.rules.slots import Slot
from lightning_optim.stepping.common import Common
from lightning_optim.stepping.group_keys import check_switches


def adam(
    p: Any,
    g: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    max_exp_avg_sq: Any = None,
    *,
    lr: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    step: Any,
    amsgrad: bool,
) -> Any:
    """The rule of Adam and AdamW."""
    exp_avg = lerp(exp_avg, g, 1 - beta1)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (g * g)
    if amsgrad:
        max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq)
    second = max_exp_avg_sq if amsgrad else exp_avg_sq
    denominator = sqrt(second) * (1 / sqrt(1 - beta2**step)) + eps  # one division per element, not two
    update = lr / (1 - beta1**step) * (exp_avg / denominator)
    return (update, exp_avg, exp_avg_sq, max_exp_avg_sq) if amsgrad else (update, exp_avg, exp_avg_sq)


ADAM = Rule(adam, slots={"max_exp_avg_sq": Slot(when="amsgrad")})


@known_as("Adam")
class AdamOptim(RuleOptimizer):
    r"""Adam, with state and results interchangeable with ``torch.optim.Adam``'s.

    .. math:: \theta \leftarrow \theta - \eta\, \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon}

    with :math:`m, v` the exponential moving averages of :math:`g` and :math:`g^2`. The public name is
    ``lightning_optim.Adam``; the class's own differs so that ``--optimizer Adam`` stays torch's in any LightningCLI.

    Args:
        params: Parameters, named parameters or param groups.
        lr: Learning rate, a number or a 0-dim tensor.
        betas: Decay rates of the two averages.
        eps: Added to the denominator.
        weight_decay: Decay coefficient: added to the gradient as ``weight_decay * p`` (L2).
        amsgrad: Divide by the largest second moment so far (arXiv:1904.09237).
        decoupled_weight_decay: Decay the weights by ``lr * weight_decay`` instead (that is AdamW).
        foreach: A switch of torch's class, taken so that calls of it work: only None and False are valid here.
        capturable: The same.
        differentiable: The same.
        fused: The same.
        common: What all optimizers have in common: see :class:`~lightning_optim.stepping.common.Common`.

    Raises:
        ValueError: An option out of its range, or unknown.

    References:
        Kingma and Ba, Adam: A Method for Stochastic Optimization, arXiv:1412.6980.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = AdamOptim([weight], lr=0.1)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight.detach()
    tensor([ 0.9000, -1.9000])
    """

    paper = "arXiv:1412.6980"
    torch_equivalent = torch.optim.Adam
    rule = ADAM
    default_decay: ClassVar[Decay] = "l2"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        foreach: Literal[False] | None = None,
        capturable: Literal[False] | None = False,
        differentiable: Literal[False] | None = False,
        fused: Literal[False] | None = None,
        **common: Unpack[Common],
    ) -> None:
        switches = {"foreach": foreach, "capturable": capturable, "differentiable": differentiable, "fused": fused}
        check_switches(type(self).public_name(), switches)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **common)
