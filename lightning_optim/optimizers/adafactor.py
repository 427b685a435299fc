"""Adafactor: Adam without momentum, whose average of squares is kept only for rows and for columns."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optim.checks import NONNEGATIVE, Range
from lightning_optim.known_as import known_as
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.rules.ops import lerp, maximum, mean, minimum, sqrt
from lightning_optim.rules.rule import Rule
from lightning_optim.rules.slots import Slot
from lightning_optim.stepping.common import Common
from lightning_optim.stepping.method import Group
from lightning_optim.stepping.options import REAL

#: The types of weights, each with its own default of eps: the distance from 1 to the next number.
_TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def adafactor(
    p: Any, g: Any, row_var: Any, col_var: Any, variance: Any,
    *, lr: Any, beta2_decay: Any, eps1: Any, eps2: Any, d: Any, step: Any,
    factored: bool, of_bfloat16: bool, of_float16: bool, of_float32: bool, of_float64: bool,
) -> Any:  # fmt: skip
    """The rule of Adafactor in the form of torch.optim."""
    for chosen, dtype in zip((of_bfloat16, of_float16, of_float32, of_float64), _TYPES, strict=True):
        if chosen:
            eps1 = torch.finfo(dtype).eps
    weight = step**beta2_decay
    if factored:
        row_var = lerp(row_var, mean(g * g, over="columns"), weight)
        col_var = lerp(col_var, mean(g * g, over="rows"), weight)
        estimate = row_var * col_var / maximum(mean(row_var, over="rows"), eps1)
    else:
        estimate = variance = lerp(variance, g * g, weight)
    update = g / sqrt(maximum(estimate, eps1 * eps1))
    size = maximum(eps2, sqrt(mean(p * p))) * minimum(lr, 1 / sqrt(step))
    update = size / maximum(1.0, sqrt(mean(update * update)) / d) * update
    return (update, row_var, col_var) if factored else (update, variance)


@known_as("Adafactor")
class AdafactorOptim(RuleOptimizer):
    r"""Adafactor: second moments in :math:`O(r+c)` memory for a weight of :math:`r \times c`, and no first moments.

    .. math:: v_r \leftarrow \mathrm{lerp}(v_r, \overline{g^2}_r, t^{\delta}), \quad
              v_c \leftarrow \mathrm{lerp}(v_c, \overline{g^2}_c, t^{\delta}), \quad
              u = g \Big/ \sqrt{v_r v_c / \overline{v_r}}, \quad
              \theta \leftarrow \theta - \frac{\max(\epsilon_2, \mathrm{RMS}(\theta)) \min(\eta, 1/\sqrt t)}
              {\max(1, \mathrm{RMS}(u)/d)}\, u

    A weight of more than two dimensions is a batch of matrices in its last two. This is the form of torch.optim: either
    can load the other's state. That of transformers is another algorithm.

    Args:
        params: Parameters, named parameters or param groups; real ones.
        lr: Upper bound of the relative step size, a number or a 0-dim tensor.
        beta2_decay: The exponent :math:`\delta \le 0` of the averages' weight.
        eps: Lower bounds: of the averages of squares, and of the weight's root mean square that steps are relative to.
            None as the first: the distance from 1 to the next number of the weight's type.
        d: Updates whose root mean square is larger are scaled down to it.
        weight_decay: Decay coefficient; the weights shrink by ``lr * weight_decay`` of themselves each step.
        decoupled_weight_decay: False adds ``weight_decay * p`` to the gradient instead (L2).
        common: What all optimizers have in common: see :class:`~lightning_optim.stepping.common.Common`.

    Raises:
        ValueError: An option out of its range, or unknown, or a complex parameter.

    References:
        Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, arXiv:1804.04235.

    >>> weight = torch.nn.Parameter(torch.tensor([[1.0, -1.0]]))
    >>> optimizer = AdafactorOptim([weight], lr=0.01)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight.detach(), {slot: tuple(value.shape) for slot, value in optimizer.state[weight].items()}
    (tensor([[ 0.9900, -0.9900]]), {'step': (), 'row_var': (1, 1), 'col_var': (1, 2)})
    """

    paper = "arXiv:1804.04235"
    torch_equivalent = torch.optim.Adafactor
    rule = Rule(
        adafactor,
        slots={
            "row_var": Slot(rate="row", when="factored"),
            "col_var": Slot(rate="column", when="factored"),
            "variance": Slot(unless="factored"),
        },
    )
    needs = (REAL,)
    ranges: ClassVar[dict[str, Range]] = {
        "eps": NONNEGATIVE.or_none(),
        "beta2_decay": Range(lambda x: x <= 0, "a number <= 0"),
        "d": Range(lambda x: x >= 1, "a number >= 1"),
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = True,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **common)

    @classmethod
    def check(cls, group: Group) -> None:
        """See :meth:`RuleOptimizer.check`."""
        if group["eps"][1] is None:
            raise ValueError(f"Adafactor: eps={group['eps']!r}; valid: a finite number >= 0 as the second")

    @classmethod
    def flags(cls, group: Group, p: Tensor, fresh: bool) -> dict[str, bool]:
        """See :meth:`RuleOptimizer.flags`."""
        chosen = {f"of_{str(dtype).removeprefix('torch.')}": p.dtype == dtype for dtype in _TYPES}
        return {"factored": p.ndim > 1} | {flag: is_it and group["eps"][0] is None for flag, is_it in chosen.items()}

    @classmethod
    def scalars(cls, group: Group) -> dict[str, float | Tensor]:
        """See :meth:`RuleOptimizer.scalars`."""
        eps1, eps2 = group["eps"]
        return super().scalars(group) | {"eps1": 0.0 if eps1 is None else eps1, "eps2": eps2}
