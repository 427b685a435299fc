"""RMSprop: the gradient divided by a running root mean square of it."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optim.checks import FRACTION, Range
from lightning_optim.known_as import known_as
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.rules.ops import lerp, sqrt
from lightning_optim.rules.policy import Decay
from lightning_optim.rules.rule import Rule
from lightning_optim.rules.slots import Slot
from lightning_optim.stepping.common import Common
from lightning_optim.stepping.method import Group


def rmsprop(
    p: Any, g: Any, square_avg: Any, grad_avg: Any, momentum_buffer: Any,
    *, lr: Any, alpha: Any, eps: Any, momentum: Any, step: Any, centered: bool, has_momentum: bool,
) -> Any:  # fmt: skip
    """The rule of RMSprop; ``step`` is counted for torch's class, which has it in its state."""
    square_avg = alpha * square_avg + (1 - alpha) * (g * g)
    variance = square_avg
    if centered:
        grad_avg = lerp(grad_avg, g, 1 - alpha)
        variance = square_avg - grad_avg * grad_avg
    direction = g / (sqrt(variance) + eps)
    if has_momentum:
        direction = momentum_buffer = momentum * momentum_buffer + direction
    state = (square_avg, *([grad_avg] if centered else []), *([momentum_buffer] if has_momentum else []))
    return lr * direction, *state


@known_as("RMSprop")
class RMSpropOptim(RuleOptimizer):
    r"""RMSprop: every element is divided by a running root mean square of its gradient.

    .. math:: v \leftarrow \alpha v + (1-\alpha)\,g^2, \quad b \leftarrow \mu b + \frac{g}{\sqrt{v}+\epsilon},
              \quad \theta \leftarrow \theta - \eta\, b

    This class and ``torch.optim.RMSprop`` can load each other's state.

    Args:
        params: Parameters, named parameters or param groups.
        lr: Learning rate, a number or a 0-dim tensor.
        alpha: Decay rate of the averages.
        eps: Added to the denominator.
        weight_decay: Decay coefficient; ``weight_decay * p`` is added to the gradient (L2).
        momentum: Momentum factor of the update; 0 keeps no buffer.
        centered: Subtract the square of the gradient's average, so that the denominator is a standard deviation.
        decoupled_weight_decay: True shrinks the weights by ``lr * weight_decay`` of themselves instead.
        common: What all optimizers have in common: see :class:`~lightning_optim.stepping.common.Common`.

    Raises:
        ValueError: An option out of its range, or unknown.

    References:
        Tieleman and Hinton, Lecture 6.5 of Neural Networks for Machine Learning, 2012. With ``centered``: Graves,
        Generating Sequences with Recurrent Neural Networks, arXiv:1308.0850.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = RMSpropOptim([weight], lr=0.01)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight.detach()  # the first step is as long as lr / sqrt(1 - alpha)
    tensor([ 0.9000, -1.9000])
    """

    paper = "https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf"
    torch_equivalent = torch.optim.RMSprop
    rule = Rule(rmsprop, slots={"grad_avg": Slot(when="centered"), "momentum_buffer": Slot(when="has_momentum")})
    default_decay: ClassVar[Decay] = "l2"
    ranges: ClassVar[dict[str, Range]] = {"alpha": FRACTION}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **common)

    @classmethod
    def flags(cls, group: Group, p: Tensor, fresh: bool) -> dict[str, bool]:
        """See :meth:`RuleOptimizer.flags`."""
        return {"centered": group["centered"], "has_momentum": group["momentum"] != 0}
