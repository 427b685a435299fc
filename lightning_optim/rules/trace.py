"""Tracing: run a rule once on symbols and get a :class:`Program` that printers turn into C or Triton.

Every node has a *rate*: a constant, a scalar (one value per tensor), or an element. Scalars are hoisted out of
the loop over memory by construction: whatever a rule computes from ``lr``, ``step`` and other scalars alone is
evaluated once per tensor in float64 and enters the loop as a number. A reduction (``norm``, ``sum``, ``mean``)
makes a scalar out of elements, and so splits the program into *passes* over memory; all stores are in the last.

>>> from lightning_optim.rules.ops import lerp, sign
>>> def lion(p, g, exp_avg, lr, beta1, beta2):
...     return {"p": p - lr * sign(lerp(exp_avg, g, 1 - beta1)), "exp_avg": lerp(exp_avg, g, 1 - beta2)}
>>> program = trace(lion, tensors=("p", "g", "exp_avg"), scalars=("lr", "beta1", "beta2"))
>>> len(program.passes), [tensor for tensor, _ in program.stores]
(1, ['p', 'exp_avg'])
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal

from lightning_optim.rules.ops import OPS, Operand

#: What a value is: see :meth:`Program.kind`.
Kind = Literal["number", "bool", "key"]


class Rate(IntEnum):
    """How often a value changes."""

    CONSTANT = 0
    SCALAR = 1  # one value per tensor: hyperparameters, step, reductions and what is computed from them
    ELEMENT = 2  # one value per element


@dataclass(frozen=True)
class Node:
    """One operation, load, scalar input or constant of a Program.

    Attributes:
        op: A name of :data:`~lightning_optim.rules.ops.OPS`, or ``"load"``, ``"scalar"``, ``"constant"``.
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


@dataclass(frozen=True)
class Pass:
    """One sweep over memory.

    Attributes:
        scalars: Scalar nodes to evaluate, per tensor, before the sweep; in order.
        elements: Element nodes to evaluate in the loop; in order.
        reductions: Reduction nodes whose operand the sweep accumulates.
        inputs: Nodes of rate SCALAR (not constants) that the loop reads.
    """

    scalars: tuple[int, ...]
    elements: tuple[int, ...]
    reductions: tuple[int, ...]
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A traced rule: straight-line code over the elements of one tensor, in one or more passes.

    Attributes:
        name: For reading and for the names of generated functions.
        tensors: Names of the tensors of a parameter, in the order of the calling convention.
        scalars: Names of the scalar inputs that are read.
        nodes: In an order in which each comes after its operands.
        stores: ``(tensor name, node)`` pairs, written in the last pass.
        results: Scalar nodes returned for each tensor (a reduction's value, say).
    """

    name: str
    tensors: tuple[str, ...]
    scalars: tuple[str, ...]
    nodes: tuple[Node, ...]
    stores: tuple[tuple[str, int], ...]
    results: tuple[int, ...] = ()
    passes: tuple[Pass, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Derive the passes."""
        object.__setattr__(self, "passes", _split(self))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that the Program says: equal for equal rules, whatever process traced them."""
        return hashlib.sha256(str(self).encode()).hexdigest()

    def kind(self, node: Node) -> Kind:
        """What the value of one of the nodes is.

        - ``"number"``: float64 as a scalar, the math type as an element;
        - ``"bool"``: a comparison, which rules also use as a number, 0 or 1;
        - ``"key"``: an unsigned 32-bit integer.
        """
        if node.op == "where":
            first, second = (self.kind(self.nodes[arg]) for arg in node.args[1:])
            return first if first == second else "number"
        result = OPS[node.op].result if node.op in OPS else "number"
        return "number" if result == "reduction" else result

    @property
    def reduces(self) -> bool:
        """Whether a value depends on all elements of a tensor."""
        return any(node.op in OPS and OPS[node.op].result == "reduction" for node in self.nodes)

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


class Graph:
    """Nodes under construction; equal ones are one (common subexpressions cost nothing)."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._index: dict[Node, int] = {}

    def add(self, node: Node) -> Symbol:
        """The symbol of ``node``, which is added unless an equal one is there."""
        if node not in self._index:
            self._index[node] = len(self.nodes)
            self.nodes.append(node)
        return Symbol(self, self._index[node])

    def constant(self, value: float) -> Symbol:
        """A number known when the rule is traced."""
        # repr keeps -0.0 apart from 0.0, which compare (and hash) equal.
        return self.add(Node("constant", (), Rate.CONSTANT, 0, (("value", float(value)), ("repr", repr(float(value))))))


class Symbol(Operand):
    """A value that is not known yet; operations on it add nodes to its graph."""

    __slots__ = ("graph", "index")

    def __init__(self, graph: Graph, index: int) -> None:
        self.graph = graph
        self.index = index

    def __rule_op__(self, name: str, args: Sequence[Any], attrs: Mapping[str, Any]) -> Symbol:
        if name not in OPS:
            raise ValueError(f"unknown operation {name!r}; the language has: {', '.join(OPS)}")
        op = OPS[name]
        graph = self.graph
        symbols = [arg if isinstance(arg, Symbol) else graph.constant(arg) for arg in args]
        nodes = [graph.nodes[symbol.index] for symbol in symbols]
        rate = max(node.rate for node in nodes)
        stage = max(node.stage for node in nodes)
        if op.result == "reduction":
            if rate != Rate.ELEMENT:
                raise TypeError(f"{name}() reduces a tensor; it was given a scalar")
            rate, stage = Rate.SCALAR, stage + 1
        elif rate == Rate.CONSTANT:
            return graph.constant(op.scalar(*(node.attr("value") for node in nodes), **attrs))
        elif name == "where" and nodes[0].rate == Rate.ELEMENT and max(nodes[1].rate, nodes[2].rate) < Rate.ELEMENT:
            raise TypeError("where(condition, a, b) with an element-wise condition: one branch must be element-wise")
        return graph.add(Node(name, tuple(s.index for s in symbols), rate, stage, tuple(sorted(attrs.items()))))


def trace(
    function: Callable[..., Mapping[str, Any]],
    *,
    tensors: Iterable[str],
    scalars: Iterable[str],
    name: str | None = None,
) -> Program:
    """Run ``function`` on symbols and record what it does.

    Args:
        function: Called with every tensor and every scalar by name; returns a mapping from tensor names to
            their new values. A key ``"return"`` holds a sequence of scalars to return for each tensor.
        tensors: Names of the tensor arguments, in the order of the calling convention. A store may also name a
            tensor of this list that is not read (a second copy of the weight, say).
        scalars: Names of the scalar arguments.
        name: Name of the Program; default ``function.__name__``.

    Returns:
        The Program; scalars and loads that nothing depends on are left out of its nodes.

    Raises:
        TypeError: The rule branches on a value, or reduces a scalar.
        ValueError: A store names an unknown tensor.
    """
    tensors, scalars = tuple(tensors), tuple(scalars)
    graph = Graph()
    inputs: dict[str, Symbol] = {}
    for tensor in tensors:
        inputs[tensor] = graph.add(Node("load", (), Rate.ELEMENT, 0, (("name", tensor),)))
    for scalar in scalars:
        inputs[scalar] = graph.add(Node("scalar", (), Rate.SCALAR, 0, (("name", scalar),)))
    outputs = dict(function(**inputs))
    results = [_as_symbol(graph, value).index for value in outputs.pop("return", ())]
    unknown = sorted(set(outputs) - set(tensors))
    if unknown:
        raise ValueError(f"the rule stores {unknown}, but its tensors are {list(tensors)}")
    stores = [(tensor, _as_symbol(graph, outputs[tensor]).index) for tensor in tensors if tensor in outputs]
    kept, renumbered = _reachable(graph.nodes, [index for _, index in stores] + results)
    return Program(
        name=name or function.__name__,
        tensors=tensors,
        scalars=tuple(node.attr("name") for node in kept if node.op == "scalar"),
        nodes=kept,
        stores=tuple((tensor, renumbered[index]) for tensor, index in stores),
        results=tuple(renumbered[index] for index in results),
    )


def _as_symbol(graph: Graph, value: Any) -> Symbol:
    return value if isinstance(value, Symbol) else graph.constant(value)


def _reachable(nodes: Sequence[Node], roots: Iterable[int]) -> tuple[tuple[Node, ...], dict[int, int]]:
    """The nodes that ``roots`` depend on, renumbered, with the new numbers."""
    needed: set[int] = set()
    stack = list(roots)
    while stack:
        index = stack.pop()
        if index not in needed:
            needed.add(index)
            stack.extend(nodes[index].args)
    renumbered = {old: new for new, old in enumerate(sorted(needed))}
    kept = tuple(
        Node(node.op, tuple(renumbered[arg] for arg in node.args), node.rate, node.stage, node.attrs)
        for node in (nodes[old] for old in sorted(needed))
    )
    return kept, renumbered


def _split(program: Program) -> tuple[Pass, ...]:
    """Assign nodes to passes: pass k computes the reductions of stage k + 1; the last one stores."""
    nodes = program.nodes
    reductions = [i for i, node in enumerate(nodes) if node.op in OPS and OPS[node.op].result == "reduction"]
    last = max((nodes[i].stage for i in reductions), default=0)
    passes = []
    for stage in range(last + 1):
        reduced = tuple(i for i in reductions if nodes[i].stage == stage + 1)
        roots = [nodes[i].args[0] for i in reduced]
        if stage == last:
            roots += [index for _, index in program.stores]
        elements = _elements(nodes, roots)
        # What the loop or a store reads of rate SCALAR; constants are printed in place.
        read = {arg for i in elements for arg in nodes[i].args} | set(roots)
        passes.append(
            Pass(
                scalars=tuple(i for i, n in enumerate(nodes) if n.rate == Rate.SCALAR and n.stage == stage),
                elements=elements,
                reductions=reduced,
                inputs=tuple(sorted(i for i in read if nodes[i].rate == Rate.SCALAR)),
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
