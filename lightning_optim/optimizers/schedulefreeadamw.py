"""Schedule-Free AdamW: averaging in place of a learning-rate schedule."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optim.checks import FINITE, NONNEGATIVE, Range, above
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.rules.ops import lerp, maximum, minimum, sqrt, where
from lightning_optim.rules.rule import Rule
from lightning_optim.rules.slots import Slot
from lightning_optim.stepping.common import Common
from lightning_optim.stepping.evaluation import EvaluatesElsewhere
from lightning_optim.stepping.method import Group


def schedule_free_adamw(
    p: Any, g: Any, exp_avg_sq: Any, z: Any, weight_sum: Any, lr_max: Any,
    *, lr: Any, beta1: Any, beta2: Any, eps: Any, weight_decay: Any, warmup_steps: Any, r: Any, weight_lr_power: Any,
    step: Any,
) -> Any:  # fmt: skip
    """The rule of Schedule-Free AdamW: the weight is y, at which gradients are taken; z makes the steps."""
    size = lr * minimum(1.0, step / maximum(warmup_steps, 1.0))
    lr_max = maximum(lr_max, size)
    weight = step**r * lr_max**weight_lr_power
    weight_sum = weight_sum + weight
    share = where(weight_sum > 0, weight / weight_sum, 0.0)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (g * g)
    direction = g / (sqrt(exp_avg_sq) / sqrt(1 - beta2**step) + eps) + weight_decay * p
    update = share * (p - z) + size * (1 - beta1 * (1 - share)) * direction
    return update, exp_avg_sq, z - size * direction, weight_sum, lr_max


def averaged(p: Any, z: Any, *, beta1: Any) -> Any:
    """The average x of the steps, with which a model is evaluated, from y, which is a mixture of x and z."""
    return lerp(p, z, 1 - 1 / beta1)


def trained(p: Any, z: Any, *, beta1: Any) -> Any:
    """The weight y, at which gradients are taken, from the average x."""
    return lerp(p, z, 1 - beta1)


class ScheduleFreeAdamW(EvaluatesElsewhere, RuleOptimizer):
    r"""Schedule-Free AdamW: AdamW that needs no learning-rate schedule and no end of training to be known.

    .. math:: y = (1-\beta_1) z + \beta_1 x, \quad z \leftarrow z - \eta u, \quad x \leftarrow (1-c)\, x + c z, \quad
              u = \frac{g(y)}{\sqrt{\hat v} + \epsilon} + \lambda y

    Gradients are taken at y, which is what the weights are in training; a model is evaluated and exported with the
    average x. :meth:`eval` puts the weights there, and :meth:`train` back, to the bit; a step in between is an error.
    Lightning's Trainers do both by themselves (:class:`~lightning_optim.callbacks.EvaluationWeights`, which also says
    how to export a model from a checkpoint); a loop of your own calls them around its evaluations. Take a larger ``lr``
    than AdamW's, with ``warmup_steps``, and no schedule.

    Args:
        params: Parameters, named parameters or param groups.
        lr: Learning rate, a number or a 0-dim tensor.
        betas: The share of the average x in y, above 0; and the decay rate of the average of squares.
        eps: Added to the denominator.
        weight_decay: Decay coefficient; ``weight_decay * y`` is added to the direction.
        warmup_steps: Steps over which the learning rate rises from 0.
        r: The average weighs step t by ``t**r``, times the factor of ``weight_lr_power``.
        weight_lr_power: The average weighs a step by the largest learning rate so far, to the power of this.
        common: What all optimizers have in common: see :class:`~lightning_optim.stepping.common.Common`.

    Raises:
        ValueError: An option out of its range, or unknown.

    References:
        Defazio et al., The Road Less Scheduled, arXiv:2405.15682.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = ScheduleFreeAdamW([weight], lr=0.1)
    >>> for _ in range(50):
    ...     optimizer.zero_grad()
    ...     weight.square().sum().backward()
    ...     optimizer.step()
    >>> before = weight.detach().clone()
    >>> optimizer.eval()
    >>> average = weight.detach().clone()
    >>> optimizer.train()
    >>> torch.equal(average, before), torch.equal(weight.detach(), before)
    (False, True)
    """

    paper = "arXiv:2405.15682"
    rule = Rule(
        schedule_free_adamw,
        slots={"z": Slot(init="p"), "weight_sum": Slot(rate="scalar"), "lr_max": Slot(rate="scalar")},
        evaluate=averaged,
        train=trained,
    )
    ranges: ClassVar[dict[str, Range]] = {"warmup_steps": NONNEGATIVE, "r": FINITE, "weight_lr_power": NONNEGATIVE}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: float = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "train_mode": True,
        }
        super().__init__(params, defaults, **common)

    @classmethod
    def check(cls, group: Group) -> None:
        """See :meth:`RuleOptimizer.check`."""
        if group["betas"][0] == 0:
            raise ValueError(f"ScheduleFreeAdamW: betas[0]={group['betas'][0]!r}; valid: {above(0, 1).words}")
