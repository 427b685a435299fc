"""Prodigy: Adam that finds its own step size, from how far the weights have come."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optim.checks import FRACTION, POSITIVE_FINITE, Range
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.rules.ops import maximum, minimum, sqrt, sum, total, where
from lightning_optim.rules.rule import Rule, Step
from lightning_optim.rules.slots import Slot
from lightning_optim.stepping.common import Common
from lightning_optim.stepping.method import Group

#: Up to this factor, the estimate counts as still the initial one: it is kept in float32, which rounds.
_SAME = 1 + 1e-6


def prodigy(
    p: Any, g: Any, exp_avg: Any, exp_avg_sq: Any, s: Any, p0: Any, d: Any, d_max: Any, d_numerator: Any,
    *, lr: Any, beta1: Any, beta2: Any, beta3: Any, eps: Any, d0: Any, d_coef: Any, growth_rate: Any, step: Any,
    use_bias_correction: bool, safeguard_warmup: bool,
) -> Any:  # fmt: skip
    """The rule of Prodigy. Averages are of gradients times ``d``; the estimate is one for all parameters."""
    correction = sqrt(1 - beta2**step) / (1 - beta1**step) if use_bias_correction else 1.0
    size = d * lr * correction
    d_numerator = beta3 * d_numerator + total(d / d0 * size * sum(g * (p0 - p)))
    moves = lr > 0  # where it is 0, the authors leave all averages as they are
    s = where(moves, beta3 * s + d / d0 * (d if safeguard_warmup else size) * g, s)
    denominator = total(sum(abs(s)))
    estimate = where(denominator > 0, d_coef * d_numerator / denominator, 0.0)
    d_max = maximum(d_max, estimate)
    new_d = minimum(d_max, where(d <= d0 * _SAME, maximum(d, estimate), d) * growth_rate)
    exp_avg = where(moves, beta1 * exp_avg + d * (1 - beta1) * g, exp_avg)
    exp_avg_sq = where(moves, beta2 * exp_avg_sq + d * d * (1 - beta2) * (g * g), exp_avg_sq)
    update = Step(where(denominator > 0, size, 0.0), exp_avg / (sqrt(exp_avg_sq) + new_d * eps))
    return update, exp_avg, exp_avg_sq, s, p0, new_d, d_max, d_numerator


class Prodigy(RuleOptimizer):
    r"""Prodigy: Adam whose step size is an estimate of the distance to the solution, found on the way.

    .. math:: r \leftarrow \sqrt{\beta_2}\, r + \eta d^2 \langle g, \theta_0 - \theta\rangle, \quad
              s \leftarrow \sqrt{\beta_2}\, s + \eta d^2 g, \quad d \leftarrow \max(d, r / \lVert s \rVert_1), \quad
              \theta \leftarrow \theta - \eta d \frac{m}{\sqrt{v} + d\epsilon}

    Leave ``lr`` at 1, with a schedule that ends at 0 (cosine, say). The estimate, :attr:`d`, is one number for all
    parameters of the optimizer, on all processes that they are divided over. The state is twice Adam's.

    Args:
        params: Parameters, named parameters or param groups.
        lr: Multiplies the estimated step size, a number or a 0-dim tensor.
        betas: Decay rates of the two averages.
        beta3: Decay rate of the estimate's sums; None: the square root of the second of ``betas``.
        eps: Added to the denominator, times ``d``.
        weight_decay: Decay coefficient; the weights shrink by ``d * lr * weight_decay`` of themselves each step.
        decoupled_weight_decay: False adds ``weight_decay * p`` to the gradient instead (L2). The authors' ``decouple``.
        use_bias_correction: Correct the averages' bias, as Adam does.
        safeguard_warmup: Leave ``lr`` out of the estimate's denominator, so that a long warmup does not inflate it.
        d0: The first estimate.
        d_coef: Multiplies the estimate: the way to tune, from 0.5 to 2.
        growth_rate: The estimate grows by no more than this factor in a step; infinite: there is no limit.
        common: What all optimizers have in common: see :class:`~lightning_optim.stepping.common.Common`.

    ``beta3``, ``d0``, ``d_coef`` and ``growth_rate`` are those of the first param group. Groups may have different
    learning rates, which the authors' code refuses: each group counts with its own.

    The estimate is worth a line in the logs; in a LightningModule::

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.log("d", self.optimizers().optimizer.d)

    Raises:
        ValueError: An option out of its range, or unknown.

    References:
        Mishchenko and Defazio, Prodigy: An Expeditiously Adaptive Parameter-Free Learner, arXiv:2306.06101.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = Prodigy([weight])
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     weight.square().sum().backward()
    ...     optimizer.step()
    >>> bool(optimizer.d > 0.1), bool(weight.detach().norm() < 1)
    (True, True)
    """

    paper = "arXiv:2306.06101"
    rule = Rule(
        prodigy,
        slots={
            "p0": Slot(init="p"),
            "d": Slot(init="d0", rate="shared"),
            "d_max": Slot(init="d0", rate="shared"),
            "d_numerator": Slot(rate="shared"),
        },
        shared=("beta3", "d0", "d_coef", "growth_rate"),
    )
    ranges: ClassVar[dict[str, Range]] = {
        "beta3": FRACTION.or_none(),
        "d0": POSITIVE_FINITE,
        "d_coef": POSITIVE_FINITE,
        "growth_rate": Range(lambda x: x >= 1, "a number >= 1"),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "beta3": beta3,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "use_bias_correction": use_bias_correction,
            "safeguard_warmup": safeguard_warmup,
            "d0": d0,
            "d_coef": d_coef,
            "growth_rate": growth_rate,
        }
        super().__init__(params, defaults, **common)

    @property
    def d(self) -> Tensor:
        """The estimate that the next step takes: a 0-dim tensor, which is returned without waiting for its device."""
        found: Iterator[Tensor] = (state["d"] for state in self.state.values() if "d" in state)
        first = self.param_groups[0]["d0"]
        return next(found, torch.as_tensor(first, dtype=torch.float32, device="cpu"))

    @classmethod
    def scalars(cls, group: Group) -> dict[str, float | Tensor]:
        """See :meth:`RuleOptimizer.scalars`."""
        beta3 = group["beta3"]
        return super().scalars(group) | {"beta3": math.sqrt(group["betas"][1]) if beta3 is None else beta3}
