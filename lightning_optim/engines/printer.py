"""From a Program to source text: what printing to C and printing to Triton have in common.

A printer is a table of expression templates, one for scalars (float64, once per tensor) and one for elements,
and four ways of writing: a constant, an assignment, a load and a store. Where a pass begins and ends, what is
computed in it and in which order comes from the Program.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import torch

from lightning_optim.engines.base import Layout
from lightning_optim.rules.ops import OPS
from lightning_optim.rules.trace import Node, Pass, Program, Rate


class Printer(ABC):
    """Prints the statements of a Program in one language.

    Attributes:
        scalar_templates: For each operation, its expression on float64 scalars, with ``{0}``, ``{1}``, ... for the
            operands and the node's attributes by name.
        element_templates: The same in the loop over elements, in the math type.

    A subclass writes :meth:`source`: the frame around the statements (functions, loops, launches).
    """

    scalar_templates: ClassVar[Mapping[str, str]]
    element_templates: ClassVar[Mapping[str, str]]

    def __init__(self, program: Program, layout: Layout) -> None:
        self.program = program
        self.layout = layout
        self.dtypes = dict(layout.dtypes)

    @abstractmethod
    def source(self) -> str:
        """The whole of the generated code."""

    @abstractmethod
    def number(self, value: float, *, element: bool) -> str:
        """A finite constant."""

    @abstractmethod
    def special(self, value: float, *, element: bool) -> str:
        """An infinite or NaN constant."""

    @abstractmethod
    def assign(self, name: str, expression: str, node: Node) -> str:
        """A statement that names the value of ``node``."""

    @abstractmethod
    def load(self, tensor: str, dtype: torch.dtype) -> str:
        """An expression: the current element of ``tensor``, in the math type."""

    @abstractmethod
    def store(self, tensor: str, dtype: torch.dtype, value: str) -> str:
        """A statement that rounds ``value`` to ``dtype`` and writes it to the current element of ``tensor``."""

    def name(self, index: int) -> str:
        """How the generated code calls node ``index``: its number, with a letter for its rate."""
        return f"{'s' if self.program.nodes[index].rate < Rate.ELEMENT else 'v'}{index}"

    def operand(self, index: int, *, element: bool) -> str:
        """A reference to node ``index``; constants are written in place."""
        node = self.program.nodes[index]
        if node.op != "constant":
            return self.name(index)
        value = node.attr("value")
        return (self.number if math.isfinite(value) else self.special)(value, element=element)

    def expression(self, index: int) -> str:
        """The right-hand side of an operation's statement."""
        node = self.program.nodes[index]
        element = node.rate == Rate.ELEMENT
        templates = self.element_templates if element else self.scalar_templates
        operands = [self.operand(arg, element=element) for arg in node.args]
        return templates[node.op].format(*operands, **dict(node.attrs))

    def element_statements(self, sweep: Pass, *, store: bool) -> list[str]:
        """The body of the loop of one pass: loads, operations and, in the last pass, stores."""
        lines = []
        for index in sweep.elements:
            node = self.program.nodes[index]
            if node.op == "load":
                tensor = node.attr("name")
                expression = self.load(tensor, self.dtypes[tensor])
            else:
                expression = self.expression(index)
            lines.append(self.assign(self.name(index), expression, node))
        if store:
            for tensor, index in self.program.stores:
                lines.append(self.store(tensor, self.dtypes[tensor], self.operand(index, element=True)))
        return lines

    def scalar_statements(
        self, sweep: Pass, read: Callable[[str], str], reduced: Callable[[int], str]
    ) -> Iterable[tuple[int, str]]:
        """The scalars to evaluate before a pass, as ``(node, statement)``.

        Args:
            sweep: The pass.
            read: The expression for a scalar input, from its name.
            reduced: The expression for a reduction's accumulated value, from its node.
        """
        for index in sweep.scalars:
            node = self.program.nodes[index]
            if node.op == "scalar":
                expression = read(node.attr("name"))
            elif OPS[node.op].result == "reduction":
                expression = self.scalar_templates[node.op].format(reduced(index))
            else:
                expression = self.expression(index)
            yield index, self.assign(self.name(index), expression, node)

    @property
    def stored(self) -> frozenset[str]:
        """Names of the tensors that the Program writes."""
        return frozenset(tensor for tensor, _ in self.program.stores)

    def accessed(self, sweep: Pass, *, store: bool) -> list[str]:
        """Names of the tensors that a pass reads or writes, in the order of the calling convention."""
        nodes = self.program.nodes
        names = {nodes[i].attr("name") for i in sweep.elements if nodes[i].op == "load"}
        if store:
            names |= self.stored
        return [tensor for tensor in self.program.tensors if tensor in names]
