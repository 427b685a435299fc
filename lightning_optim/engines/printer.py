"""Printing a Program as source text: the part that C and Triton have in common.

A printer is tables of expression templates (for scalars, in float64, once per tensor; for elements; for what
reductions accumulate) and a few ways of writing: a constant, an assignment, a load, a store, a widening. Where a
pass begins and ends, what is computed in it and in which order comes from the Program.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import torch

from lightning_optim.engines.base import TENSOR_SCALARS, Layout
from lightning_optim.rules.program import Kind, Node, Pass, Program, Rate
from lightning_optim.rules.table import OPS

#: Operations that exist for elements only, not for scalars.
ROUNDING_OPS = frozenset({"round_to", "stochastic_round"})


class Printer(ABC):
    """Prints the statements of a Program in one language.

    Templates are written with these placeholders:

    - ``{0}``, ``{1}``, ...: the operands. Each is a name or a constant that needs no parentheses. The operand of a
      reduction's scalar template is the accumulated value, in float64.
    - ``{numel}``: :attr:`numel`; only in scalar templates.
    - ``{index}``: :attr:`index`; only in element templates.
    - the node's attributes by name: ``{dtype}`` of ``round_to``.

    The frame that :meth:`source` writes around the statements (functions, loops, launches) must define what
    :attr:`numel` and :attr:`index` refer to, and may not otherwise use the names ``s<number>`` and ``v<number>``,
    which are the nodes' (see :meth:`name`).

    Attributes:
        scalar_templates: For each operation, its expression on float64 scalars; for each reduction, its expression on
            the accumulated value.
        element_templates: For each operation that is not a reduction, its expression in the loop over elements, in
            the math type.
        accumulate_templates: For each reduction, what the loop adds up: an expression of its widened operand.
        numel: Expression for the number of elements of the tensor, where scalars are evaluated.
        index: Expression for the place in memory of the current element: its number in the whole tensor (not in a
            chunk or block), an integer that must be able to exceed 32 bits.
    """

    scalar_templates: ClassVar[Mapping[str, str]]
    element_templates: ClassVar[Mapping[str, str]]
    accumulate_templates: ClassVar[Mapping[str, str]] = {"sum": "{0}", "mean": "{0}", "norm": "{0} * {0}"}
    numel: ClassVar[str] = "numel"
    index: ClassVar[str]

    def __init__(self, program: Program, layout: Layout) -> None:
        self.program = program
        self.layout = layout
        self.dtypes = dict(layout.dtypes)

    @classmethod
    def lacks(cls, program: Program) -> str | None:
        """Why a Program cannot be printed, or None if it can."""
        if program.has_sides:
            return "a rule with values of rows and columns needs torch's own operators"
        ops = {node.op for node in program.nodes if node.op in OPS} - set(cls.scalar_templates) - ROUNDING_OPS
        return f"it has no {', '.join(sorted(ops))}" if ops else None

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
        """A statement that names the value of ``node``, whose type follows from its rate and :meth:`kind`."""

    @abstractmethod
    def load(self, tensor: str, dtype: torch.dtype) -> str:
        """An expression for the current element of ``tensor``, in the math type."""

    @abstractmethod
    def store(self, tensor: str, dtype: torch.dtype, value: str) -> str:
        """A statement that rounds ``value`` to ``dtype`` and writes it to the current element of ``tensor``."""

    @abstractmethod
    def load_scalar(self, tensor: str, dtype: torch.dtype) -> str:
        """An expression for the one number of ``tensor``, in float64."""

    @abstractmethod
    def store_scalar(self, tensor: str, dtype: torch.dtype, value: str) -> str:
        """A statement that rounds ``value``, a scalar, to ``dtype`` and writes it to the one number of ``tensor``."""

    @abstractmethod
    def widen(self, value: str) -> str:
        """An operand: ``value``, an element (a number or a bool), in the type in which reductions accumulate."""

    def kind(self, node: Node) -> Kind:
        """What the value of ``node`` is: see :meth:`Program.kind`.

        Scalars of every kind travel as float64 (in ``work``, say); it is the loop over elements that converts them.
        """
        return self.program.kind(node)

    def name(self, index: int) -> str:
        """The name of node ``index`` in generated code: its index, with a letter for its rate."""
        return f"{'s' if self.program.nodes[index].is_scalar else 'v'}{index}"

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
        place = {"index": self.index} if element else {"numel": self.numel}
        return templates[node.op].format(*operands, **place, **dict(node.attrs))

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
            for tensor, index in self.program.element_stores:
                lines.append(self.store(tensor, self.dtypes[tensor], self.operand(index, element=True)))
        return lines

    def accumulated(self, sweep: Pass) -> list[tuple[int, str]]:
        """What the loop of a pass adds up, as ``(reduction node, expression of the current element)``."""
        nodes = self.program.nodes
        return [
            (i, self.accumulate_templates[nodes[i].op].format(self.widen(self.name(nodes[i].args[0]))))
            for i in sweep.reductions
        ]

    def scalar_statements(
        self, sweep: Pass, read: Callable[[str], str], reduced: Callable[[int], str]
    ) -> Iterable[tuple[int, str]]:
        """The scalars to evaluate before a pass, as ``(node, statement)``.

        Args:
            sweep: The pass.
            read: The expression for a scalar input, from its name.
            reduced: The expression for a reduction's accumulated value, from its node: an operand.
        """
        for index in sweep.scalars:
            node = self.program.nodes[index]
            if node.op == "scalar":
                expression = read(node.attr("name"))
            elif node.op == "load":
                expression = self.load_scalar(node.attr("name"), self.dtypes[node.attr("name")])
            elif OPS[node.op].result == "reduction":
                expression = self.scalar_templates[node.op].format(reduced(index), numel=self.numel)
            else:
                expression = self.expression(index)
            yield index, self.assign(self.name(index), expression, node)

    @property
    def table_scalars(self) -> list[str]:
        """The scalar inputs that come from a param group's line in the table, in its order."""
        return [name for name in self.program.scalars if name not in TENSOR_SCALARS]

    @property
    def work_slots(self) -> dict[int, int]:
        """The place of each scalar node in a tensor's part of ``work``, the memory that keeps scalars."""
        scalars = [i for i, node in enumerate(self.program.nodes) if node.is_scalar]
        return {index: slot for slot, index in enumerate(scalars)}

    @property
    def reductions(self) -> int:
        """The largest number of reductions in any one pass."""
        return max(len(sweep.reductions) for sweep in self.program.passes)

    def reduced_before(self, stage: int) -> tuple[int, ...]:
        """The reductions that the pass before pass ``stage`` accumulated, in its order."""
        return self.program.passes[stage - 1].reductions if stage else ()

    def earlier_scalars(self, sweep: Pass) -> list[int]:
        """The scalars of earlier stages that the scalars of a pass are computed from, or that the last pass stores."""
        nodes, own = self.program.nodes, set(sweep.scalars)
        read = {arg for i in own for arg in nodes[i].args if nodes[arg].is_scalar}
        if sweep is self.program.passes[-1]:
            read |= {index for _, index in self.program.scalar_stores if nodes[index].is_scalar}
        return sorted(read - own)

    def scalar_stores(self, sweep: Pass) -> list[str]:
        """The stores of single numbers, which come with the scalars of the last pass."""
        if sweep is not self.program.passes[-1]:
            return []
        return [
            self.store_scalar(tensor, self.dtypes[tensor], self.operand(index, element=False))
            for tensor, index in self.program.scalar_stores
        ]

    @property
    def stored(self) -> frozenset[str]:
        """Names of the tensors that the last sweep writes."""
        return frozenset(tensor for tensor, _ in self.program.element_stores)

    def accessed(self, sweep: Pass, *, store: bool) -> list[str]:
        """Names of the tensors that a pass reads or writes, in the order of the calling convention."""
        nodes = self.program.nodes
        names = {nodes[i].attr("name") for i in sweep.elements if nodes[i].op == "load"}
        if store:
            names |= self.stored
        return [tensor for tensor in self.program.tensors if tensor in names]
