"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optim.known_as import known_as
from lightning_optim.optimizers.adam import ADAM
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.rules.policy import Decay
from lightning_optim.stepping.common import Common
from lightning_optim.stepping.group_keys import check_switches
from lightning_optim.stepping.method import Group


@known_as("AdamW")
class AdamWOptim(RuleOptimizer):
    r"""AdamW, with state and results interchangeable with ``torch.optim.AdamW``'s.

    .. math:: \theta \leftarrow (1 - \eta\lambda)\,\theta
              - \eta\, \frac{m / (1-\beta_1^t)}{\sqrt{v / (1-\beta_2^t)} + \epsilon}

    with :math:`m, v` the exponential moving averages of :math:`g` and :math:`g^2`. The public name is
    ``lightning_optim.AdamW``; the class's own differs so that ``--optimizer AdamW`` stays torch's in any
    LightningCLI.

    Args:
        params: Parameters, named parameters or param groups.
        lr: Learning rate, a number or a 0-dim tensor.
        betas: Decay rates of the two averages.
        eps: Added to the denominator.
        weight_decay: Decay coefficient; the weights shrink by ``lr * weight_decay`` of themselves each step.
        amsgrad: Divide by the largest second moment so far (arXiv:1904.09237).
        foreach: A switch of torch's class, taken so that calls of it work: only None and False are valid here.
        capturable: The same.
        differentiable: The same.
        fused: The same.
        common: What all optimizers have in common: see :class:`~lightning_optim.stepping.common.Common`.

    Raises:
        ValueError: An option out of its range, or unknown.

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = AdamWOptim([weight], lr=0.1, weight_decay=0.5)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight.detach()
    tensor([ 0.8500, -1.8000])
    """

    paper = "arXiv:1711.05101"
    torch_equivalent = torch.optim.AdamW
    rule = ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
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
        }
        super().__init__(params, defaults, **common)

    @classmethod
    def decay(cls, group: Group) -> Decay:
        """Always decoupled, as in ``torch.optim.AdamW``, also for a state saved by ``torch.optim.Adam``."""
        return "decoupled"
