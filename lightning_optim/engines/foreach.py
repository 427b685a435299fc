"""The foreach engine: runs a Program on lists of tensors by ``torch._foreach_*``, with few launches on any device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.base import Bucket, Engine, Scalars, advance, in_place
from lightning_optim.engines.progress import Progress, Write
from lightning_optim.engines.scaling import Scaling
from lightning_optim.rules.interpret import interpret
from lightning_optim.rules.ops import Operand
from lightning_optim.rules.table import OPS, widest

# A rule makes a temporary list for each intermediate value; working on parts of a long list bounds their memory.
# 64 Mi elements are 256 MiB per intermediate in float32, and hundreds of microseconds of memory time: launches
# stay negligible.
PART_ELEMENTS = 1 << 26


class TensorList(Operand):
    """A list of tensors with the operations of the language, element by element."""

    __slots__ = ("tensors",)

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)

    def __rule_op__(self, name: str, args: Sequence[Any], attrs: Mapping[str, Any]) -> TensorList:
        function = _FOREACH.get(name)
        if function is not None and (not attrs or (name == "norm" and "over" not in attrs)):
            result = function(*(arg.tensors if isinstance(arg, TensorList) else arg for arg in args), **attrs)
            if result is not None:
                return TensorList(result)
        columns = [arg.tensors if isinstance(arg, TensorList) else [arg] * len(self.tensors) for arg in args]
        return TensorList([OPS[name].tensor(*row, **attrs) for row in zip(*columns, strict=True)])


def _commutative(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def call(a: Any, b: Any) -> Any:
        return function(a, b) if isinstance(a, list) else function(b, a)

    return call


def _sub(a: Any, b: Any) -> Any:
    if isinstance(a, list):
        return torch._foreach_sub(a, b) if not isinstance(b, Tensor) else torch._foreach_add(a, -b)
    return torch._foreach_add(torch._foreach_neg(b), a)


def _div(a: Any, b: Any) -> Any:
    return torch._foreach_div(a, b) if isinstance(a, list) else None  # x * (1 / y) would round twice


def _pow(a: Any, b: Any) -> Any:
    if isinstance(a, list) and not isinstance(b, Tensor) and (isinstance(b, list) or abs(b) != 0.5):
        return torch._foreach_pow(a, b)
    return None  # for square roots, see the operation itself


def _lerp(a: Any, b: Any, weight: Any) -> Any:
    if isinstance(a, list) and isinstance(b, list) and not isinstance(weight, Tensor):
        return torch._foreach_lerp(a, b, weight)
    return None


def _norm(a: Any, wide: bool = False) -> Any:
    if a[0].device.type == "cpu":
        return None  # see the operation's own comment
    return torch._foreach_norm(a, dtype=widest(a[0].device) if wide else None)


def _same_kind(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def call(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return None
        return function(a, b) if isinstance(a, list) else function(b, a)

    return call


#: Operations with a ``torch._foreach_`` form; a function returns None where it does not cover its operands, and
#: the operation is then done tensor by tensor.
_FOREACH: dict[str, Callable[..., Any]] = {
    "add": _commutative(torch._foreach_add),
    "sub": _sub,
    "mul": _commutative(torch._foreach_mul),
    "div": _div,
    "neg": torch._foreach_neg,
    "pow": _pow,
    "sqrt": torch._foreach_sqrt,
    "abs": torch._foreach_abs,
    "exp": torch._foreach_exp,
    "log": torch._foreach_log,
    "sign": torch._foreach_sign,
    "maximum": _same_kind(torch._foreach_maximum),
    "minimum": _same_kind(torch._foreach_minimum),
    "lerp": _lerp,
    "norm": _norm,
}


class ForeachEngine(Engine):
    """Runs any rule on plain tensors of one device, many at a time."""

    name = "foreach"

    def rejects(self, bucket: Bucket) -> str | None:
        """See :meth:`Engine.rejects`."""
        plain = (torch.Tensor, torch.nn.Parameter)
        for tensor in bucket.tensors["p"]:
            if type(tensor) not in plain:
                return f"{type(tensor).__name__} weights need torch's own operators"
        return in_place(bucket)

    @torch.no_grad()
    def run(self, bucket: Bucket, table: Sequence[Scalars], scaling: Scaling | None = None) -> None:
        """See :meth:`Engine.run`."""
        progress = bucket.progress or Progress()
        progress.finish()
        parts = _parts(bucket)
        while (number := progress.parts) < len(parts):
            indices = parts[number]
            stored = {name: [tensors[i] for i in indices] for name, tensors in bucket.tensors.items()}
            columns = self._computed(bucket, bucket.scalars(indices[0], table), stored)
            writes: list[Write] = [partial(_store, stored[name], new) for name, new in columns.items()]
            progress.write([*writes, *(advance(bucket) if number == len(parts) - 1 else [])])

    @staticmethod
    def _computed(bucket: Bucket, scalars: Scalars, stored: dict[str, list[Tensor]]) -> dict[str, list[Tensor] | float]:
        """The new values of the lists of tensors that are written."""
        math, program = bucket.layout.math, bucket.update.program
        loaded = {name: TensorList([t.to(math) for t in stored[name]]) for name in program.loads}
        new = interpret(program, loaded, scalars, math, each)
        own = {id(tensor) for column in loaded.values() for tensor in column.tensors}
        # A new value that is a loaded tensor itself (slots that swap, say) is copied before anything is written.
        return {n: v if isinstance(v, float) else _clones(v.tensors, own) for n, v in new.items()}


def each(function: Callable[[Tensor], Tensor], operand: Any) -> Any:
    """Apply a function to a tensor, or to each tensor of a list."""
    return TensorList(map(function, operand.tensors)) if isinstance(operand, TensorList) else function(operand)


def _clones(tensors: list[Tensor], own: set[int]) -> list[Tensor]:
    return [t.clone() if id(t) in own else t for t in tensors]


def _store(stored: list[Tensor], column: list[Tensor] | float) -> None:
    if isinstance(column, float):
        torch._foreach_zero_(stored)
        torch._foreach_add_(stored, column)
    elif all(t.shape == new.shape for t, new in zip(stored, column, strict=True)):
        torch._foreach_copy_(stored, column)
    else:  # a scalar, for all elements
        for t, new in zip(stored, column, strict=True):
            t.copy_(new)


def _parts(bucket: Bucket) -> list[list[int]]:
    """The indices of the parameters, in parts of bounded size whose parameters share all scalars."""
    same: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    noisy = bucket.update.policy.rounding == "stochastic"
    for index, group in enumerate(bucket.groups):
        step = bucket.steps[index].item() if bucket.steps is not None else 0
        same[(group, step, bucket.ids[index] if noisy else 0)].append(index)
    parts = []
    for indices in same.values():
        part: list[int] = []
        elements = 0
        for index in indices:
            size = bucket.tensors["p"][index].numel()
            if part and elements + size > PART_ELEMENTS:
                parts.append(part)
                part, elements = [], 0
            part.append(index)
            elements += size
        parts.append(part)
    # The largest part comes first: if memory runs out, it does so before anything is written.
    return sorted(parts, key=lambda part: -sum(bucket.tensors["p"][i].numel() for i in part))
