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

from typing import Any

from torch import Tensor

from lightning_optim.rules.table import DIMENSION, OPS

# What rules compute with. `Any` keeps rules readable: `Tensor | float | Expr | TensorList` has no common operators.
Value = Any


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


def floor(x: Value) -> Value:
    """The largest whole number that is not above ``x``."""
    return apply("floor", x)


def tanh(x: Value) -> Value:
    """Hyperbolic tangent."""
    return apply("tanh", x)


def atan2(y: Value, x: Value) -> Value:
    """The angle of the point ``(x, y)``: the arc tangent of ``y / x``, for any ``x``."""
    return apply("atan2", y, x)


def clip(x: Value, low: Value, high: Value) -> Value:
    """``x``, but not below ``low`` and not above ``high``; NaN stays NaN."""
    return minimum(maximum(x, low), high)


def maximum(a: Value, b: Value) -> Value:
    """The larger of two values; NaN if either is, as ``torch.maximum``."""
    return apply("maximum", *_constant_last(a, b))


def minimum(a: Value, b: Value) -> Value:
    """The smaller of two values; NaN if either is, as ``torch.minimum``."""
    return apply("minimum", *_constant_last(a, b))


def _constant_last(a: Value, b: Value) -> tuple[Value, Value]:
    """The operands, a constant last: kernels ask whether the first one is NaN, which a constant never is."""
    return (b, a) if isinstance(a, int | float) else (a, b)


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


def sum(x: Value, over: str | None = None) -> Value:
    """Sum over the elements of one parameter tensor: ends a pass over memory.

    Args:
        x: Elements; or, summed over rows, one number for each row.
        over: None; ``"rows"``, which leaves one number for each column; or ``"columns"``, one for each row.
    """
    return _reduced("sum", x, over)


def norm(x: Value, over: str | None = None) -> Value:
    """Euclidean norm over the elements of one parameter tensor: ends a pass over memory; ``over`` as in :func:`sum`."""
    return _reduced("norm", x, over)


def mean(x: Value, over: str | None = None) -> Value:
    """Mean over the elements of one parameter tensor (0 if it has none): ends a pass; ``over`` as in :func:`sum`."""
    return _reduced("mean", x, over)


def total(x: Value) -> Value:
    """Sum over all parameters of an optimizer, and over all processes that they are divided over: ends a phase.

    Args:
        x: Elements, or one number for each parameter tensor.
    """
    return apply("total", x)


def _reduced(name: str, x: Value, over: str | None) -> Value:
    if over not in (None, *DIMENSION):
        raise ValueError(f"{name}() over {over!r}; valid: None, {', '.join(DIMENSION)}")
    return apply(name, x) if over is None else apply(name, x, over=over)


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
