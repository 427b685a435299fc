"""The interpreter: runs a Program on tensors, node by node as printed code does, for engines that compile nothing.

Running the rule's own function on tensors would be shorter but would differ: Python raises where C divides by zero, a
scalar from a reduction would be as narrow as the tensors, and a number that float32 cannot hold would be an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.rules.ops import apply
from lightning_optim.rules.program import Node, Program, Rate
from lightning_optim.rules.table import OPS, wide, widest

#: Applies a function of tensors to an operand.
Each = Callable[[Callable[[Tensor], Tensor], Any], Any]


def interpret(
    program: Program,
    tensors: Mapping[str, Any],
    scalars: Mapping[str, float | Tensor],
    dtype: torch.dtype,
    each: Each = lambda function, tensor: function(tensor),
) -> dict[str, Any]:
    """The new value of every tensor that a Program stores.

    Args:
        program: The Program.
        tensors: The tensors that it loads, by name and in the math type; an operand may stand for several tensors.
        scalars: Its scalar inputs: numbers, or 0-dim tensors on a device.
        dtype: The math type.
        each: Applies a function of tensors to an operand; default: to a tensor.

    Returns:
        For each stored name an operand of the same kind, or a number if all elements get the same value.

    >>> from lightning_optim.rules.trace import trace
    >>> program = trace(lambda p, g, lr: {"p": p - lr * g}, tensors=("p", "g"), scalars=("lr",), name="sgd")
    >>> interpret(program, {"p": torch.ones(2), "g": torch.ones(2)}, {"lr": 0.5}, torch.float32)
    {'p': tensor([0.5000, 0.5000])}
    """
    run = _evaluated(program, tensors, scalars, dtype, each)
    return {
        name: run.values[index] if name in program.scalar_tensors else run.element(index)
        for name, index in program.stores
    }


def interpret_results(
    program: Program,
    tensors: Mapping[str, Any],
    scalars: Mapping[str, float | Tensor],
    dtype: torch.dtype,
    each: Each = lambda function, tensor: function(tensor),
) -> list[Any]:
    """The results of a Program: scalars in float64. The arguments are those of :func:`interpret`."""
    run = _evaluated(program, tensors, scalars, dtype, each)
    return [run.values[index] for index in program.results]


def _evaluated(
    program: Program, tensors: Mapping[str, Any], scalars: Mapping[str, float | Tensor], dtype: torch.dtype, each: Each
) -> _Run:
    run = _Run(program, dtype, each)
    last = {arg: index for index, node in enumerate(program.nodes) for arg in node.args}
    kept = {index for _, index in program.stores} | set(program.results)
    for index, node in enumerate(program.nodes):
        if node.op == "load":
            value = tensors[node.attr("name")]
            run.values[index] = each(wide, value) if node.is_scalar else value
        elif node.op == "scalar":
            value = scalars[node.attr("name")]
            run.values[index] = wide(value) if isinstance(value, Tensor) else float(value)
        elif node.op == "constant":
            run.values[index] = node.attr("value")
        else:
            run.values[index] = run.operation(node)
            for arg in set(node.args):  # memory is held no longer than it is needed
                if last[arg] == index and arg not in kept:
                    del run.values[arg]
    return run


class _Run:
    """The values of one interpretation so far, by node: numbers, or operands of whatever kind the tensors are.

    Scalars are float64, as in every engine: numbers, or 0-dim tensors where they come from a device or a reduction.
    """

    def __init__(self, program: Program, dtype: torch.dtype, each: Each) -> None:
        self.program = program
        self.dtype = dtype
        self.each = each
        self.values: dict[int, Any] = {}
        self._narrow: dict[int, Any] = {}

    def operation(self, node: Node) -> Any:
        """The value of an operation."""
        op = OPS[node.op]
        if op.result == "reduction":
            reduced = apply(node.op, self.element(node.args[0]), wide=True, **dict(node.attrs))
            return reduced if node.is_scalar else self.each(lambda tensor: tensor.to(self.dtype), reduced)
        value = self.element if node.rate > Rate.SCALAR else self.values.__getitem__
        operands = [value(arg) for arg in node.args]
        if node.op == "where":
            return self._selected(node, *operands)
        if op.result == "number":
            operands = [self._counted(arg, x, node) for arg, x in zip(node.args, operands, strict=True)]
        return apply(node.op, *operands, **dict(node.attrs))

    def element(self, index: int) -> Any:
        """The value of a node as an operand of element-wise operations: scalars are rounded to the math type."""
        node, value = self.program.nodes[index], self.values[index]
        if node.rate > Rate.SCALAR or self.program.kind(node) == "key":
            return value
        if isinstance(value, int | float):
            # A number that is too large for float32 becomes infinite: some of torch's functions refuse such numbers.
            return ctypes.c_float(value).value if self.dtype == torch.float32 else float(value)
        if index not in self._narrow:
            self._narrow[index] = self.each(lambda tensor: tensor.to(self.dtype), value)
        return self._narrow[index]

    def _selected(self, node: Node, condition: Any, a: Any, b: Any) -> Any:
        if isinstance(condition, int | float):
            return a if condition else b
        if all(isinstance(branch, int | float) for branch in (a, b)):
            # Two bare numbers would be of torch's default type.
            a = self.each(lambda tensor: torch.full_like(tensor, a, dtype=self._type(node, tensor)), condition)
        if self.program.kind(self.program.nodes[node.args[0]]) == "bool":
            return apply("where", condition, a, b)
        at_most = apply("where", apply("ge", condition, 0.0), b, a)  # a NaN is not zero
        return apply("where", apply("le", condition, 0.0), at_most, a)

    def _counted(self, index: int, value: Any, node: Node) -> Any:
        """An operand as a number: the result of a comparison becomes 0 or 1."""
        if self.program.kind(self.program.nodes[index]) != "bool":
            return value
        if isinstance(value, int | float):
            return float(value)
        return self.each(lambda tensor: tensor.to(self._type(node, tensor)), value)

    def _type(self, node: Node, tensor: Tensor) -> torch.dtype:
        return self.dtype if node.rate > Rate.SCALAR else widest(tensor.device)
