"""SOAP: Adam in the eigenbases of Shampoo's preconditioners."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_optim.checks import FRACTION, Range, whole
from lightning_optim.engines.eigenbases import Bases, eigenbasis, products, refined, reordered, rotate
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.rules.matrix import GRADIENT, MatrixRule, Stack, Transform
from lightning_optim.rules.ops import lerp, sqrt
from lightning_optim.rules.policy import Decay
from lightning_optim.rules.rule import Rule
from lightning_optim.rules.slots import Slot
from lightning_optim.stepping.common import CommonOfMatrices
from lightning_optim.stepping.links import Rest
from lightning_optim.stepping.method import Group

#: The most dimensions that a weight may have: those of a three-dimensional convolution's kernel.
MOST_DIMENSIONS = 5


def soap(p: Any, g: Any, exp_avg: Any, exp_avg_sq: Any, *, lr: Any, beta1: Any, beta2: Any, eps: Any, step: Any) -> Any:
    """The rule of Adam in the form of SOAP's authors: eps is added to the square root before the bias correction."""
    exp_avg = lerp(exp_avg, g, 1 - beta1)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (g * g)
    size = lr * sqrt(1 - beta2**step) / (1 - beta1**step)
    return size * (exp_avg / (sqrt(exp_avg_sq) + eps)), exp_avg, exp_avg_sq


class Constants(NamedTuple):
    """What SOAP's matrices of one stack have in common.

    Attributes:
        beta: Decay rate of the averaged products.
        dimensions: The dimensions that have a basis.
    """

    beta: float | Tensor
    dimensions: tuple[int, ...]


class Eigenbases(Transform):
    """Rotation into the eigenbases of the gradient's averaged products, one for each dimension, and back."""

    most = 1 << 24  # a larger matrix keeps a device busy by itself
    workspace = 16  # four tensors: the gradient, the same in the eigenbases, the direction there, and the update

    def shape(self, group: Group, p: Tensor) -> tuple[int, ...]:
        """See :meth:`Transform.shape`."""
        return (1, *p.shape)

    def constants(self, group: Group, shape: tuple[int, ...]) -> Constants:
        """See :meth:`Transform.constants`."""
        beta = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
        return Constants(beta, _preconditioned(group, shape))

    def forth(self, x: Tensor, stack: Stack) -> Tensor:
        """See :meth:`Transform.forth`."""
        return rotate(x, _bases(stack))

    def back(self, x: Tensor, given: Tensor, stack: Stack) -> Tensor:
        """See :meth:`Transform.back`."""
        bases = _bases(stack)
        averages = _averaged(given, stack)
        if stack.due:
            self._renew(bases, averages, stack)
        return rotate(x, bases, back=True)

    def begin(self, x: Tensor, stack: Stack) -> None:
        """See :meth:`Transform.begin`."""
        for dimension, average in _averaged(x, stack).items():
            stack.new[f"q_{dimension}"] = eigenbasis(average)

    @staticmethod
    def _renew(bases: Bases, averages: Bases, stack: Stack) -> None:
        """Turn the bases towards the eigenvectors, and Adam's averages with them."""
        new, second = dict[int, Tensor](), stack.read("exp_avg_sq")
        for dimension, average in averages.items():
            new[dimension], order = refined(average, bases[dimension])
            stack.new[f"q_{dimension}"] = new[dimension]
            second = reordered(second, dimension, order)
        stack.new["exp_avg"] = rotate(rotate(stack.read("exp_avg"), bases, back=True), new)
        stack.new["exp_avg_sq"] = second


def _preconditioned(group: Group, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions of a weight that have a basis."""
    if len(shape) < 2:
        return ()
    return tuple(dimension for dimension, size in enumerate(shape) if 0 < size <= group["max_precond_dim"])


def _bases(stack: Stack) -> dict[int, Tensor]:
    return {dimension: stack.read(f"q_{dimension}") for dimension in stack.constants.dimensions}


def _averaged(x: Tensor, stack: Stack) -> dict[int, Tensor]:
    """The averaged products, into which those of these directions are averaged; ``stack.new`` gets them too."""
    beta, dimensions = stack.constants
    for dimension in dimensions:
        stack.new[f"gg_{dimension}"] = torch.lerp(stack.read(f"gg_{dimension}"), products(x, dimension), 1 - beta)
    return {dimension: stack.new[f"gg_{dimension}"] for dimension in dimensions}


_SLOTS = {
    f"{slot}_{dimension}": Slot(shape=(dimension, dimension), when=f"has_basis_{dimension}")
    for slot in ("gg", "q")
    for dimension in range(MOST_DIMENSIONS)
}


class SOAP(RuleOptimizer):
    r"""SOAP: Adam in the slowly turning eigenbases of Shampoo's preconditioners.

    .. math:: G' = Q_L^\top G\, Q_R, \quad
              \Theta \leftarrow \Theta - \eta\,\frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\;
              Q_L \frac{M}{\sqrt{V} + \epsilon} Q_R^\top, \quad
              \Theta \leftarrow (1-\eta\lambda)\,\Theta

    with :math:`M, V` the exponential moving averages of :math:`G'` and its square. Then
    :math:`L \leftarrow \mathrm{lerp}(L, G G^\top, 1-\beta)` and :math:`R` likewise with :math:`G^\top G`; every
    ``precondition_frequency`` steps one power iteration and a QR decomposition turn :math:`Q_L, Q_R` towards the
    eigenvectors of :math:`L, R`, and :math:`M, V` with them. As in the authors' code:

    - A parameter's first gradient makes :math:`L, R` and the bases; there is no update, and no decay. The first
      update is its second.
    - A weight of more dimensions, as a convolution's kernel, has a basis for each one.
    - Vectors and scalars are stepped by Adam, and so are weights all of whose dimensions are larger than
      ``max_precond_dim``. In other weights, only the dimensions that are larger have no basis.

    State: besides ``step``, ``exp_avg`` and ``exp_avg_sq`` (in the eigenbases), the matrices ``gg_0``, ``gg_1``, …
    (the authors' ``GG``) and ``q_0``, ``q_1``, … (their ``Q``) by dimension: for a square weight, four more times its
    size. Matrices are kept and decomposed in float32 (in float64 for float64 weights), whatever ``state_dtype`` is.
    Between renewals nothing in a step waits for a CUDA device; at a parameter's first gradient, ``eigh`` waits, to
    check whether it has converged.

    Bases are renewed every ``precondition_frequency`` steps of the param group after its first step. The group's key
    ``updates``, which is saved, counts these steps. A step that is left out renews nothing.

    Weights that are divided over processes (DTensors, as FSDP2 makes them) are stepped as whole tensors: each process
    gathers the gradients, and has all of the matrices.

    Args:
        params: Parameters, named parameters or param groups.
        lr: Learning rate, a number or a 0-dim tensor.
        betas: Decay rates of the averaged gradient and of its square.
        eps: Added to the denominator.
        weight_decay: Decay coefficient; weights shrink by ``lr * weight_decay`` of themselves after each step.
        precondition_frequency: After how many steps the bases are renewed.
        max_precond_dim: Dimensions that are larger than this have no basis: those of vocabularies, say.
        shampoo_beta: Decay rate of the averaged products; None: the second of ``betas``.
        common: What all optimizers have in common: see :class:`~lightning_optim.stepping.common.CommonOfMatrices`.

    Raises:
        ValueError: An option out of its range, or unknown; a weight of more than five dimensions.
        TypeError: An option of the wrong type.

    References:
        Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, arXiv:2409.11321.

    >>> weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    >>> optimizer = SOAP([weight], lr=0.1, weight_decay=0.0)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     weight.square().sum().backward()
    ...     optimizer.step()
    >>> weight.detach().round(decimals=3)
    tensor([[ 0.9550, -1.9110]])
    """

    paper = "arXiv:2409.11321"
    rule = Rule(soap)
    ranges: ClassVar[dict[str, Range]] = {
        "precondition_frequency": whole(1),
        "max_precond_dim": whole(1),
        "shampoo_beta": FRACTION.or_none(),
    }
    matrix_rule = MatrixRule(
        GRADIENT, Eigenbases(), within=rule, slots=_SLOTS, begins=True, interval="precondition_frequency"
    )
    rest = Rest(rule, "Adam")
    default_decay: ClassVar[Decay] = "after"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        *,
        shampoo_beta: float | None = None,
        **common: Unpack[CommonOfMatrices],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
            "shampoo_beta": shampoo_beta,
        }
        super().__init__(params, defaults, **common)

    @classmethod
    def check(cls, group: Group) -> None:
        """Check a group's weights."""
        for index, p in enumerate(group["params"]):
            if p.ndim > MOST_DIMENSIONS:
                raise ValueError(
                    f"{cls.public_name()}: parameter {index} of the group has shape {tuple(p.shape)}; valid: at most "
                    f"{MOST_DIMENSIONS} dimensions"
                )

    @classmethod
    def by_matrices(cls, group: Group, p: Tensor) -> bool:
        """See :meth:`RuleOptimizer.by_matrices`: whether any dimension has a basis."""
        return p.is_floating_point() and p.numel() > 0 and bool(_preconditioned(group, tuple(p.shape)))

    @classmethod
    def flags(cls, group: Group, p: Tensor, fresh: bool) -> dict[str, bool]:
        """See :meth:`RuleOptimizer.flags`: which dimensions have a basis."""
        del fresh
        dimensions = _preconditioned(group, tuple(p.shape)) if cls.by_matrices(group, p) else ()
        return {f"has_basis_{dimension}": dimension in dimensions for dimension in range(MOST_DIMENSIONS)}
