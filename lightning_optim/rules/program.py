"""Programs: the traced form of rules, which all engines run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal

from lightning_optim.rules.table import OPS

#: What a value is: see :meth:`Program.kind`.
Kind = Literal["number", "bool", "key"]


class Rate(IntEnum):
    """How often a value changes."""

    CONSTANT = 0
    SHARED = 1  # one value for all tensors of an optimizer: totals, shared slots and what is computed from them
    SCALAR = 2  # one value per tensor: hyperparameters, step, reductions and what is computed from them
    ROW = 3  # one value per row of a matrix
    COLUMN = 4  # one value per column
    ELEMENT = 5  # one value per element

    @staticmethod
    def of(rates: Iterable[Rate]) -> Rate:
        """The rate of what is computed from values of these rates.

        >>> Rate.of([Rate.SCALAR, Rate.ROW]).name, Rate.of([Rate.ROW, Rate.COLUMN]).name
        ('ROW', 'ELEMENT')
        """
        present = set(rates)
        return Rate.ELEMENT if {Rate.ROW, Rate.COLUMN} <= present else max(present)

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Node:
    """One operation, load, scalar input or constant of a Program.

    Attributes:
        op: A name of :data:`~lightning_optim.rules.table.OPS`, or ``"load"``, ``"scalar"``, ``"constant"``.
        args: Indices of the operands among the Program's nodes.
        rate: See :class:`Rate`.
        stage: The pass over memory that must have ended before this value can be computed (scalars), or in
            which it first can be (elements): the number of reductions on the longest path to it.
        attrs: Constants of the operation: the name of a load or scalar, a constant's value, a dtype's name.
    """

    op: str
    args: tuple[int, ...]
    rate: Rate
    stage: int
    attrs: tuple[tuple[str, Any], ...] = ()

    def attr(self, name: str) -> Any:
        """The value of one of :attr:`attrs`."""
        return dict(self.attrs)[name]

    @property
    def is_scalar(self) -> bool:
        """Whether the node is evaluated once per tensor, or once for all tensors, and is not a constant."""
        return self.rate in (Rate.SHARED, Rate.SCALAR)

    @property
    def reduces(self) -> bool:
        """Whether the node is a reduction, which makes fewer values out of more."""
        return self.op in OPS and OPS[self.op].result == "reduction"


@dataclass(frozen=True)
class Pass:
    """One sweep over memory.

    Attributes:
        scalars: Scalar nodes to evaluate, per tensor, before the sweep; in order.
        elements: Element nodes to evaluate in the loop; in order.
        reductions: Reduction nodes whose operand the sweep accumulates.
        inputs: Scalar nodes (not constants) that the loop reads.
    """

    scalars: tuple[int, ...]
    elements: tuple[int, ...]
    reductions: tuple[int, ...]
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Phase:
    """Totals over all tensors that must be known before a Program can run.

    Attributes:
        names: Names of the totals, which are scalar inputs of the Programs after this phase.
        program: The Program whose results, one for each total, are added up over all tensors.
    """

    names: tuple[str, ...]
    program: Program


@dataclass(frozen=True)
class Program:
    """A traced rule: straight-line code over the elements of one tensor, in one or more passes.

    Attributes:
        name: The rule's name, for people who read the Program or generated code.
        tensors: Names of the tensors of a parameter, in the order of the calling convention.
        scalars: Names of the scalar inputs that are read.
        nodes: The nodes, each after its operands.
        stores: ``(tensor name, node)`` pairs, written in the last pass.
        results: Scalar nodes returned for each tensor (a reduction's value, say).
        phases: The phases that come before this Program, in order.
        shared: The Program that updates the shared slots, if there are any; it loads no tensors.
        scalar_tensors: Names of the tensors that are one number each.
    """

    name: str
    tensors: tuple[str, ...]
    scalars: tuple[str, ...]
    nodes: tuple[Node, ...]
    stores: tuple[tuple[str, int], ...]
    results: tuple[int, ...] = ()
    phases: tuple[Phase, ...] = ()
    shared: Program | None = None
    scalar_tensors: tuple[str, ...] = ()
    passes: tuple[Pass, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Derive the passes."""
        object.__setattr__(self, "passes", _split(self))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the Program's text: equal for equal rules, whatever process traced them."""
        return hashlib.sha256(str(self).encode()).hexdigest()

    def kind(self, node: Node) -> Kind:
        """The kind of a node's value.

        - ``"number"``: float64 as a scalar, the math type as an element;
        - ``"bool"``: a comparison, which rules also use as a number, 0 or 1;
        - ``"key"``: an unsigned 32-bit integer.
        """
        if node.op == "where":
            first, second = (self.kind(self.nodes[arg]) for arg in node.args[1:])
            return first if first == second else "number"
        result = OPS[node.op].result if node.op in OPS else "number"
        return result if result == "bool" or result == "key" else "number"

    @cached_property
    def counts_steps(self) -> bool:
        """Whether the Program or one of its phases reads the step counter."""
        return any("step" in program.scalars for program in (self, *(phase.program for phase in self.phases)))

    @property
    def reduces(self) -> bool:
        """Whether a value depends on other elements of its tensor."""
        return any(node.reduces for node in self.nodes)

    @property
    def adds_up(self) -> bool:
        """Whether the results of a tensor's parts add up to those of the whole, as sums times numbers do."""
        return all(map(self._adds_up, self.results))

    def _adds_up(self, index: int) -> bool:
        node = self.nodes[index]
        reduced = [arg for arg in node.args if self.nodes[arg].stage > 0]
        if node.reduces:
            return node.op == "sum" and not (node.attrs or reduced)
        if node.op in ("add", "sub", "neg"):
            return len(reduced) == len(node.args) and all(map(self._adds_up, reduced))
        multiplied = len(reduced) == 1 and (node.op == "mul" or (node.op == "div" and reduced == [node.args[0]]))
        return multiplied and self._adds_up(reduced[0])

    @property
    def has_sides(self) -> bool:
        """Whether there are values per row or column, so that tensors cannot be treated as flat arrays."""
        return any(node.rate in (Rate.ROW, Rate.COLUMN) for node in self.nodes)

    @property
    def element_stores(self) -> tuple[tuple[str, int], ...]:
        """Those of :attr:`stores` that are not single numbers."""
        return tuple((tensor, index) for tensor, index in self.stores if tensor not in self.scalar_tensors)

    @property
    def scalar_stores(self) -> tuple[tuple[str, int], ...]:
        """Those of :attr:`stores` that are single numbers."""
        return tuple((tensor, index) for tensor, index in self.stores if tensor in self.scalar_tensors)

    @cached_property
    def loads(self) -> tuple[str, ...]:
        """Names of the tensors that are read."""
        return tuple(node.attr("name") for node in self.nodes if node.op == "load")

    def __str__(self) -> str:
        lines = [f"{self.name}({', '.join(self.tensors)}; {', '.join(self.scalars)})"]
        for index, node in enumerate(self.nodes):
            attrs = "".join(f" {key}={value!r}" for key, value in node.attrs)
            args = "".join(f" %{arg}" for arg in node.args)
            lines.append(f"  %{index} = {node.op}{args}{attrs}  # {node.rate.name.lower()}, stage {node.stage}")
        lines += [f"  store {tensor} %{index}" for tensor, index in self.stores]
        lines += [f"  return %{index}" for index in self.results]
        return "\n".join(lines)


def _split(program: Program) -> tuple[Pass, ...]:
    """Assign nodes to passes: pass k computes the reductions of stage k + 1; the last one stores."""
    nodes = program.nodes
    reductions = [i for i, node in enumerate(nodes) if node.reduces]
    last = max((nodes[i].stage for i in reductions), default=0)
    passes = []
    for stage in range(last + 1):
        reduced = tuple(i for i in reductions if nodes[i].stage == stage + 1)
        roots = [nodes[i].args[0] for i in reduced]
        if stage == last:
            roots += [index for _, index in program.element_stores]
        elements = _elements(nodes, roots)
        # The scalars that the loop or a store reads; constants are printed in place.
        read = {arg for i in elements for arg in nodes[i].args} | set(roots)
        passes.append(
            Pass(
                scalars=tuple(i for i, n in enumerate(nodes) if n.is_scalar and n.stage == stage),
                elements=elements,
                reductions=reduced,
                inputs=tuple(sorted(i for i in read if nodes[i].is_scalar)),
            )
        )
    return tuple(passes)


def _elements(nodes: Sequence[Node], roots: Iterable[int]) -> tuple[int, ...]:
    needed: set[int] = set()
    stack = [index for index in roots if nodes[index].rate == Rate.ELEMENT]
    while stack:
        index = stack.pop()
        if index not in needed:
            needed.add(index)
            stack.extend(arg for arg in nodes[index].args if nodes[arg].rate == Rate.ELEMENT)
    return tuple(sorted(needed))
