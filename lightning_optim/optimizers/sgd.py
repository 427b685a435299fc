"""SGD: stochastic gradient descent, with momentum."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optim.known_as import known_as
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.rules.policy import Decay
from lightning_optim.rules.rule import Rule
from lightning_optim.rules.slots import Slot
from lightning_optim.stepping.common import Common
from lightning_optim.stepping.group_keys import check_switches
from lightning_optim.stepping.method import Group


def sgd(
    p: Any,
    g: Any,
    momentum_buffer: Any = None,
    *,
    lr: Any,
    momentum: Any,
    dampening: Any,
    nesterov: bool,
    has_momentum: bool,
    undamped: bool,
) -> Any:
    """The rule of SGD; ``undamped`` without dampening, and at a first step, at which torch's buffer is the gradient."""
    if not has_momentum:
        return lr * g
    momentum_buffer = momentum * momentum_buffer + (g if undamped else (1 - dampening) * g)
    return lr * (g + momentum * momentum_buffer if nesterov else momentum_buffer), momentum_buffer


@known_as("SGD")
class SGDOptim(RuleOptimizer):
    r"""SGD, with state and results interchangeable with ``torch.optim.SGD``'s.

    .. math:: b \leftarrow \mu b + (1-\tau) g, \quad \theta \leftarrow \theta - \eta\, b

    The public name is ``lightning_optim.SGD``; the class's own differs so that ``--optimizer SGD`` stays torch's in
    any LightningCLI.

    Args:
        params: Parameters, named parameters or param groups.
        lr: Learning rate, a number or a 0-dim tensor.
        momentum: Momentum factor; 0 keeps no state.
        dampening: Dampening of the gradient in the momentum buffer.
        weight_decay: Decay coefficient: added to the gradient as ``weight_decay * p`` (L2).
        nesterov: Nesterov's form of the momentum; needs ``momentum > 0`` and ``dampening == 0``.
        decoupled_weight_decay: Decay the weights by ``lr * weight_decay`` instead (SGDW).
        foreach: A switch of torch's class, taken so that calls of it work: only None and False are valid here.
        differentiable: The same.
        fused: The same.
        common: What all optimizers have in common: see :class:`~lightning_optim.stepping.common.Common`.

    Raises:
        ValueError: An option out of its range, or unknown; Nesterov without momentum or with dampening.

    References:
        Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = SGDOptim([weight], lr=0.1, momentum=0.9)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight.detach()
    tensor([ 0.8000, -1.6000])
    """

    paper = "Sutskever et al., ICML 2013"
    torch_equivalent = torch.optim.SGD
    rule = Rule(sgd, slots={"momentum_buffer": Slot(when="has_momentum")})
    default_decay: ClassVar[Decay] = "l2"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        foreach: Literal[False] | None = None,
        differentiable: Literal[False] | None = False,
        fused: Literal[False] | None = None,
        **common: Unpack[Common],
    ) -> None:
        switches = {"foreach": foreach, "differentiable": differentiable, "fused": fused}
        check_switches(type(self).public_name(), switches)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **common)

    @classmethod
    def check(cls, group: Group) -> None:
        """See :meth:`RuleOptimizer.check`."""
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"SGD: nesterov=True with momentum={group['momentum']}, dampening={group['dampening']}; "
                "valid: momentum > 0 and dampening == 0"
            )

    @classmethod
    def flags(cls, group: Group, p: Tensor, fresh: bool) -> dict[str, bool]:
        """See :meth:`RuleOptimizer.flags`."""
        return {
            "nesterov": bool(group["nesterov"]),
            "has_momentum": bool(group["momentum"] != 0),
            "undamped": bool(fresh or group["dampening"] == 0),
        }
