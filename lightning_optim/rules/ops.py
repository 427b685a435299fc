"""The closed table of operations in which every update rule is written.

A rule runs unchanged on four kinds of value: Python floats (scalars), tensors (the eager engine and the
float64 reference), lists of tensors (foreach) and symbols (tracing, and so C and Triton). An operation is
therefore an entry in :data:`OPS`, with its meaning for floats and for tensors; any other kind of value
implements ``__rule_op__(name, args, attrs)`` and gets all operations, and through :class:`Operand` all
operators, at once.

>>> import torch
>>> from lightning_optim.rules.ops import lerp, sqrt
>>> sqrt(4.0), sqrt(torch.tensor([4.0, 9.0]))
(2.0, tensor([2., 3.]))
>>> lerp(torch.zeros(2), torch.ones(2), 0.25)
tensor([0.2500, 0.2500])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_optim.rules import rounding

# What rules compute with. `Any` keeps rules readable: `Tensor | float | Expr | TensorList` has no common operators.
Value = Any


@dataclass(frozen=True)
class Op:
    """One operation of the language.

    Attributes:
        name: Key in :data:`OPS`, and in every printer's table.
        arity: Number of operands.
        scalar: Meaning for Python floats (and bools).
        tensor: Meaning when at least one operand is a tensor.
        result: ``"number"``, ``"bool"``, ``"reduction"`` (one number per tensor), or ``"key"`` (an unsigned 32-bit
            integer, which travels as a float64 scalar: float32 would lose bits of it).
    """

    name: str
    arity: int
    scalar: Callable[..., Any]
    tensor: Callable[..., Any]
    result: Literal["number", "bool", "key", "reduction"] = "number"


def _tensor_like(reference: Tensor, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=reference.dtype, device=reference.device)


def _tensor_binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    """Torch's function for tensors only (maximum, pow, ...), made to accept a number on either side."""

    def call(a: Any, b: Any) -> Tensor:
        reference = a if isinstance(a, Tensor) else b
        return function(_tensor_like(reference, a), _tensor_like(reference, b))

    return call


def _tensor_pow(a: Any, b: Any) -> Tensor:
    if isinstance(b, Tensor) or abs(b) != 0.5:
        return a**b
    # torch takes square roots there, which of -inf and -0 are others than powers.
    return torch.where(a == -math.inf, math.inf**b, (a + 0.0) ** b)


def _scalar_sign(x: float) -> float:
    return float(x > 0) - float(x < 0)


def _scalar_maximum(a: float, b: float) -> float:
    return a if a > b or a != a else b  # Python's max(0.0, nan) is 0


def _scalar_minimum(a: float, b: float) -> float:
    return a if a < b or a != a else b


def _scalar_lerp(a: float, b: float, weight: float) -> float:
    # The two branches of torch.lerp: exact at both ends.
    return a + weight * (b - a) if abs(weight) < 0.5 else b - (b - a) * (1 - weight)


def _tensor_lerp(a: Any, b: Any, weight: Any) -> Tensor:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.lerp(a, b, weight)
    reference = next(x for x in (a, b, weight) if isinstance(x, Tensor))
    return torch.lerp(*(_tensor_like(reference, x) for x in (a, b, weight)))


def _ieee(scalar: Callable[..., float], tensor: Callable[..., Tensor]) -> Callable[..., float]:
    """Python's function, but where it raises, the infinity or NaN that tensors and C have.

    A rule may divide by a zero that a ``where`` discards.
    """

    def call(*args: float) -> float:
        try:
            return scalar(*args)
        except (ArithmeticError, ValueError):
            return tensor(*(torch.tensor(arg, dtype=torch.float64, device="cpu") for arg in args)).item()

    return call


def _scalar_where(condition: bool, a: Any, b: Any) -> Any:
    return a if condition else b


def _tensor_where(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, Tensor):
        return a if condition else b
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        # Two bare numbers would give a tensor of torch's default dtype, whatever the rule's precision.
        raise TypeError(f"where(condition, {a}, {b}): one of the two branches must be a tensor")
    return torch.where(condition, a, b)


def _not_for_scalars(name: str) -> Callable[..., float]:
    def call(*_: float, **__: Any) -> float:
        raise TypeError(f"{name}() reduces or rounds a tensor; it was given a Python number")

    return call


def widest(device: torch.device) -> torch.dtype:
    """The type of scalars: float64, where a device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(tensor: Tensor) -> Tensor:
    """A tensor in the type of scalars."""
    return tensor.to(widest(tensor.device))


# Reductions of a tensor are of its own type, or, where engines ask for it, as wide as scalars are.


def _tensor_sum(x: Tensor, wide: bool = False) -> Tensor:
    return x.sum(dtype=widest(x.device) if wide else x.dtype)


def _tensor_norm(x: Tensor, wide: bool = False) -> Tensor:
    dtype = widest(x.device) if wide else x.dtype
    if x.device.type == "cpu":
        # torch's CPU kernel adds float32 squares one after the other: 7e-4 off at 16 M elements (with `dtype=float64`
        # it is right, but not vectorized: 11 ns an element).
        return torch.linalg.vector_norm(x.double()).to(dtype)
    return torch.linalg.vector_norm(x, dtype=dtype)


def _tensor_mean(x: Tensor, wide: bool = False) -> Tensor:
    return _tensor_sum(x, wide) / max(x.numel(), 1)  # an empty tensor has mean 0, not NaN


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("add", 2, lambda a, b: a + b, lambda a, b: a + b),
        Op("sub", 2, lambda a, b: a - b, lambda a, b: a - b),
        Op("mul", 2, lambda a, b: a * b, lambda a, b: a * b),
        Op("div", 2, _ieee(lambda a, b: a / b, torch.div), lambda a, b: a / b),
        Op("neg", 1, lambda a: -a, lambda a: -a),
        Op("pow", 2, _ieee(math.pow, torch.pow), _tensor_pow),
        Op("sqrt", 1, _ieee(math.sqrt, torch.sqrt), torch.sqrt),
        Op("abs", 1, abs, torch.abs),
        Op("exp", 1, _ieee(math.exp, torch.exp), torch.exp),
        Op("log", 1, _ieee(math.log, torch.log), torch.log),
        Op("sign", 1, _scalar_sign, torch.sign),
        Op("maximum", 2, _scalar_maximum, _tensor_binary(torch.maximum)),
        Op("minimum", 2, _scalar_minimum, _tensor_binary(torch.minimum)),
        Op("lerp", 3, _scalar_lerp, _tensor_lerp),
        Op("gt", 2, lambda a, b: a > b, lambda a, b: a > b, "bool"),
        Op("ge", 2, lambda a, b: a >= b, lambda a, b: a >= b, "bool"),
        Op("lt", 2, lambda a, b: a < b, lambda a, b: a < b, "bool"),
        Op("le", 2, lambda a, b: a <= b, lambda a, b: a <= b, "bool"),
        Op("where", 3, _scalar_where, _tensor_where),
        Op("round_to", 1, _not_for_scalars("round_to"), rounding.round_to),
        Op("noise_key", 4, rounding.noise_key, rounding.noise_key, "key"),
        Op("stochastic_round", 2, _not_for_scalars("stochastic_round"), rounding.stochastic_round),
        Op("sum", 1, _not_for_scalars("sum"), _tensor_sum, "reduction"),
        Op("norm", 1, _not_for_scalars("norm"), _tensor_norm, "reduction"),
        Op("mean", 1, _not_for_scalars("mean"), _tensor_mean, "reduction"),
    )
}


def apply(name: str, *args: Value, **attrs: Any) -> Value:
    """Apply operation ``name`` to values of any kind: the one point of dispatch.

    Raises:
        KeyError: ``name`` is not in :data:`OPS` and no operand implements it.
    """
    for arg in args:
        handler = getattr(arg, "__rule_op__", None)
        if handler is not None:
            return handler(name, args, attrs)
    op = OPS[name]
    if any(isinstance(arg, Tensor) for arg in args):
        return op.tensor(*args, **attrs)
    return op.scalar(*args, **attrs)


def sqrt(x: Value) -> Value:
    """Square root."""
    return apply("sqrt", x)


def exp(x: Value) -> Value:
    """Natural exponential."""
    return apply("exp", x)


def log(x: Value) -> Value:
    """Natural logarithm."""
    return apply("log", x)


def sign(x: Value) -> Value:
    """-1, 0 or 1; the sign of NaN is 0, as ``torch.sign`` has it."""
    return apply("sign", x)


def maximum(a: Value, b: Value) -> Value:
    """The larger of two values; NaN if either is, as ``torch.maximum``."""
    return apply("maximum", a, b)


def minimum(a: Value, b: Value) -> Value:
    """The smaller of two values; NaN if either is, as ``torch.minimum``."""
    return apply("minimum", a, b)


def lerp(a: Value, b: Value, weight: Value) -> Value:
    """``a + weight * (b - a)``, exact at both ends, as ``torch.lerp``: an EMA is ``lerp(ema, x, 1 - beta)``."""
    return apply("lerp", a, b, weight)


def where(condition: Value, a: Value, b: Value) -> Value:
    """``a`` where ``condition`` holds, else ``b``. Both are computed; neither may have side effects."""
    return apply("where", condition, a, b)


def round_to(x: Value, dtype: str) -> Value:
    """``x`` rounded to the nearest number of a storage type (``"bfloat16"``, ...), kept in the math type."""
    return apply("round_to", x, dtype=dtype)


def noise_key(seed: Value, tensor_id: Value, step: Value, salt: int) -> Value:
    """The 32-bit key of one tensor's rounding noise at one step: see :mod:`lightning_optim.rules.rounding`."""
    return apply("noise_key", seed, tensor_id, step, float(salt))


def stochastic_round(x: Value, key: Value) -> Value:
    """``x`` rounded to one of its two bfloat16 neighbours, with odds that make the mean exact."""
    return apply("stochastic_round", x, key)


# `abs`, `pow` and the comparisons are Python's own operators, which every kind of value has.


def sum(x: Value) -> Value:
    """Sum over the elements of one parameter tensor: ends a pass over memory."""
    return apply("sum", x)


def norm(x: Value) -> Value:
    """Euclidean norm over the elements of one parameter tensor: ends a pass over memory."""
    return apply("norm", x)


def mean(x: Value) -> Value:
    """Mean over the elements of one parameter tensor (0 if it has none): ends a pass over memory."""
    return apply("mean", x)


class Operand:
    """Python's operators, by way of ``__rule_op__``, for every value that is not a float or a tensor."""

    __slots__ = ()

    # Comparisons return values of the language; equality keeps Python's meaning, so that operands can be keys.
    def __add__(self, other: Value) -> Value:
        return apply("add", self, other)

    def __radd__(self, other: Value) -> Value:
        return apply("add", other, self)

    def __sub__(self, other: Value) -> Value:
        return apply("sub", self, other)

    def __rsub__(self, other: Value) -> Value:
        return apply("sub", other, self)

    def __mul__(self, other: Value) -> Value:
        return apply("mul", self, other)

    def __rmul__(self, other: Value) -> Value:
        return apply("mul", other, self)

    def __truediv__(self, other: Value) -> Value:
        return apply("div", self, other)

    def __rtruediv__(self, other: Value) -> Value:
        return apply("div", other, self)

    def __pow__(self, other: Value) -> Value:
        return apply("pow", self, other)

    def __rpow__(self, other: Value) -> Value:
        return apply("pow", other, self)

    def __neg__(self) -> Value:
        return apply("neg", self)

    def __abs__(self) -> Value:
        return apply("abs", self)

    def __gt__(self, other: Value) -> Value:
        return apply("gt", self, other)

    def __ge__(self, other: Value) -> Value:
        return apply("ge", self, other)

    def __lt__(self, other: Value) -> Value:
        return apply("lt", self, other)

    def __le__(self, other: Value) -> Value:
        return apply("le", self, other)

    def __bool__(self) -> bool:
        raise TypeError(
            "an update rule cannot branch on the value of a tensor or a scalar: it is traced once and run for "
            "every value; use where(condition, a, b), or a bool option, which is known when the rule is traced"
        )
