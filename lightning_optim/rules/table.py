"""The closed table of operations: what each means for Python floats, and for tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_optim.rules import rounding


@dataclass(frozen=True)
class Op:
    """One operation of the language.

    Attributes:
        name: Key in :data:`OPS`, and in every printer's table.
        arity: Number of operands.
        scalar: Meaning for Python floats (and bools).
        tensor: Meaning when at least one operand is a tensor.
        result: ``"number"``, ``"bool"``, ``"reduction"`` (one number per tensor, row or column), ``"total"`` (one
            number for all tensors of an optimizer), or ``"key"`` (an unsigned 32-bit integer, which travels as a
            float64 scalar: float32 would lose bits of it).
    """

    name: str
    arity: int
    scalar: Callable[..., Any]
    tensor: Callable[..., Any]
    result: Literal["number", "bool", "key", "reduction", "total"] = "number"


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
    # For these exponents torch takes square roots, which differ from powers at -inf and -0.
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
    """Python's function, which gives the infinity or NaN of tensors and C where it would raise.

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


def _not_for_tensors(name: str) -> Callable[..., Tensor]:
    def call(*_: Any, **__: Any) -> Tensor:
        raise TypeError(f"{name}() is over all tensors of an optimizer, of which this is one; trace the rule")

    return call


def widest(device: torch.device) -> torch.dtype:
    """The type of scalars: float64, where a device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(tensor: Tensor) -> Tensor:
    """A tensor in the type of scalars."""
    return tensor.to(widest(tensor.device))


#: The dimension that a reduction over rows or columns sums along; a matrix is the last two dimensions of a tensor.
DIMENSION = {"rows": -2, "columns": -1}

# A reduction has its tensor's type or, where engines ask for it, the type of scalars. A reduction over rows or columns
# keeps the dimension, so that the result broadcasts with the elements.


def _tensor_sum(x: Tensor, wide: bool = False, over: str | None = None) -> Tensor:
    dtype = widest(x.device) if wide else x.dtype
    return x.sum(dtype=dtype) if over is None else x.sum(DIMENSION[over], keepdim=True, dtype=dtype)


def _tensor_norm(x: Tensor, wide: bool = False, over: str | None = None) -> Tensor:
    dtype = widest(x.device) if wide else x.dtype
    if over is not None:
        return torch.linalg.vector_norm(x, dim=DIMENSION[over], keepdim=True, dtype=dtype)
    if x.device.type == "cpu":
        # torch's CPU kernel adds float32 squares one after the other: 7e-4 off at 16 M elements (with `dtype=float64`
        # it is right, but not vectorized: 11 ns an element).
        return torch.linalg.vector_norm(x.double()).to(dtype)
    return torch.linalg.vector_norm(x, dtype=dtype)


def _tensor_mean(x: Tensor, wide: bool = False, over: str | None = None) -> Tensor:
    count = x.numel() if over is None else x.shape[DIMENSION[over]]
    return _tensor_sum(x, wide, over) / max(count, 1)  # an empty tensor has mean 0, not NaN


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
        Op("floor", 1, _ieee(lambda a: float(math.floor(a)), torch.floor), torch.floor),
        Op("tanh", 1, math.tanh, torch.tanh),
        Op("atan2", 2, math.atan2, _tensor_binary(torch.atan2)),
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
        Op("total", 1, _not_for_scalars("total"), _not_for_tensors("total"), "total"),
    )
}
