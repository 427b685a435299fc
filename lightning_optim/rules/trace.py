"""Tracing: run a rule once on symbols and get a :class:`~lightning_optim.rules.program.Program` that engines run.

Every node has a *rate*: a constant, a scalar (one value per tensor), or an element. Scalars are hoisted out of
the loop over memory by construction: whatever a rule computes from ``lr``, ``step`` and other scalars alone is
evaluated once per tensor in float64 and enters the loop as a number. A reduction (``norm``, ``sum``, ``mean``)
makes a scalar out of elements, and so splits the program into *passes* over memory; all stores are in the last.
A ``total`` is over all tensors, and so splits it into Programs that are run one after the other, its *phases*.

>>> from lightning_optim.rules.ops import lerp, sign
>>> def lion(p, g, exp_avg, lr, beta1, beta2):
...     return {"p": p - lr * sign(lerp(exp_avg, g, 1 - beta1)), "exp_avg": lerp(exp_avg, g, 1 - beta2)}
>>> program = trace(lion, tensors=("p", "g", "exp_avg"), scalars=("lr", "beta1", "beta2"))
>>> len(program.passes), [tensor for tensor, _ in program.stores]
(1, ['p', 'exp_avg'])
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from lightning_optim.rules.ops import Operand
from lightning_optim.rules.program import Node, Phase, Program, Rate
from lightning_optim.rules.table import OPS

__all__ = ["Node", "Program", "Rate", "trace"]


class Graph:
    """A graph under construction; equal nodes are merged (common subexpressions cost nothing)."""

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

    def operation(self, name: str, args: Sequence[int], attrs: Mapping[str, Any]) -> Symbol:
        """The symbol of an operation on nodes.

        Raises:
            TypeError: The operation does not take operands of these rates.
        """
        op = OPS[name]
        nodes = [self.nodes[index] for index in args]
        rate = Rate.of(node.rate for node in nodes)
        stage = max(node.stage for node in nodes)
        if op.result == "total":
            if rate not in (Rate.SCALAR, Rate.ELEMENT):
                raise TypeError(f"total() is over elements, or over one number for each tensor; it was given a {rate}")
            if rate == Rate.ELEMENT:
                return self.operation("total", [self.operation("sum", args, {}).index], attrs)
            rate, stage = Rate.SHARED, 0
        elif op.result == "reduction":
            rate, stage = _reduced_rate(name, rate, attrs.get("over")), stage + 1
        elif rate == Rate.CONSTANT:
            return self.constant(op.scalar(*(node.attr("value") for node in nodes), **attrs))
        elif name == "where" and nodes[0].rate > Rate.SCALAR and max(nodes[1].rate, nodes[2].rate) <= Rate.SCALAR:
            raise TypeError("where(condition, a, b) with an element-wise condition: one branch must be element-wise")
        return self.add(Node(name, tuple(args), rate, stage, tuple(sorted(attrs.items()))))


def _reduced_rate(name: str, rate: Rate, over: str | None) -> Rate:
    if over is None:
        if rate != Rate.ELEMENT:
            raise TypeError(f"{name}() reduces a tensor; it was given a {rate}")
        return Rate.SCALAR
    left, along = (Rate.COLUMN, Rate.ROW) if over == "rows" else (Rate.ROW, Rate.COLUMN)
    if rate == Rate.ELEMENT:
        return left
    if rate != along:
        raise TypeError(f"{name}() over {over} reduces elements or one number for each of the {over}; not a {rate}")
    return along  # one number per matrix, which broadcasts with rows and columns alike


class Symbol(Operand):
    """A value that is not known yet; operations on it add nodes to its graph."""

    __slots__ = ("graph", "index")

    def __init__(self, graph: Graph, index: int) -> None:
        self.graph = graph
        self.index = index

    def __rule_op__(self, name: str, args: Sequence[Any], attrs: Mapping[str, Any]) -> Symbol:
        if name not in OPS:
            raise ValueError(f"unknown operation {name!r}; the language has: {', '.join(OPS)}")
        return self.graph.operation(name, [_as_symbol(self.graph, arg).index for arg in args], attrs)


def trace(
    function: Callable[..., Mapping[str, Any]],
    *,
    tensors: Iterable[str],
    scalars: Iterable[str],
    name: str | None = None,
    rates: Mapping[str, Rate] | None = None,
    shared: Collection[str] = (),
) -> Program:
    """Run ``function`` on symbols and record what it does.

    Args:
        function: Called with every tensor and every scalar by name; returns a mapping from tensor names to
            their new values. A key ``"return"`` holds a sequence of scalars to return for each tensor.
        tensors: Names of the tensor arguments, in the order of the calling convention. A store may also name a
            tensor of this list that is not read (a second copy of the weight, say).
        scalars: Names of the scalar arguments.
        name: Name of the Program; default ``function.__name__``.
        rates: Rates of the tensors that do not have one number for each element.
        shared: Names of the scalars that are the same for all tensors.

    Returns:
        The Program; scalars and loads that nothing depends on are left out of its nodes, as are stores of what was
        loaded from the same place.

    Raises:
        TypeError: The rule branches on a value, or gives an operation or a store a value of the wrong rate.
        ValueError: A store names an unknown tensor.
    """
    tensors, scalars, rates = tuple(tensors), tuple(scalars), dict(rates or {})
    graph = Graph()
    inputs: dict[str, Symbol] = {}
    for tensor in tensors:
        inputs[tensor] = graph.add(Node("load", (), rates.get(tensor, Rate.ELEMENT), 0, (("name", tensor),)))
    for scalar in scalars:
        rate = Rate.SHARED if scalar in shared else Rate.SCALAR
        inputs[scalar] = graph.add(Node("scalar", (), rate, 0, (("name", scalar),)))
    outputs = dict(function(**inputs))
    results = [_as_symbol(graph, value).index for value in outputs.pop("return", ())]
    unknown = sorted(set(outputs) - set(tensors))
    if unknown:
        raise ValueError(f"the rule stores {unknown}, but its tensors are {list(tensors)}")
    stores = [(tensor, _as_symbol(graph, outputs[tensor]).index) for tensor in tensors if tensor in outputs]
    stores = [(tensor, index) for tensor, index in stores if index != inputs[tensor].index]
    for tensor, index in stores:
        _check_store(tensor, rates.get(tensor, Rate.ELEMENT), graph.nodes[index].rate)
    name = name or function.__name__
    return _Phases(name, tensors, rates, graph).program(stores, results)


def _check_store(tensor: str, rate: Rate, value: Rate) -> None:
    if Rate.of((rate, value)) != rate:
        raise TypeError(f"the rule stores a {value} in {tensor}, which is a {rate}")


def _as_symbol(graph: Graph, value: Any) -> Symbol:
    return value if isinstance(value, Symbol) else graph.constant(value)


class _Phases:
    """Divides a graph into Programs: each total is a result of one, and a scalar of those after it."""

    def __init__(self, name: str, tensors: tuple[str, ...], rates: Mapping[str, Rate], graph: Graph) -> None:
        self.name, self.tensors, self.rates, self.nodes = name, tensors, rates, graph.nodes
        self.totals: dict[int, str] = {}

    def program(self, stores: Sequence[tuple[str, int]], results: Sequence[int]) -> Program:
        """The Program of some stores and results, with the phases before it."""
        roots = [index for _, index in stores] + list(results)
        phases: list[Phase] = []
        for waiting in self._in_order(roots):
            names = tuple(f"total_{len(self.totals) + place}" for place in range(len(waiting)))
            summed = [self.nodes[index].args[0] for index in waiting]
            phases.append(Phase(names, self._cut(f"{self.name}_totals", [], summed)))
            self.totals.update(zip(waiting, names, strict=True))
        common = [(tensor, index) for tensor, index in stores if self.rates.get(tensor) == Rate.SHARED]
        own = [(tensor, index) for tensor, index in stores if self.rates.get(tensor) != Rate.SHARED]
        shared = self._cut(f"{self.name}_shared", common, []) if common else None
        return self._cut(self.name, own, results, tuple(phases), shared)

    def _in_order(self, roots: Sequence[int]) -> list[list[int]]:
        """The totals that roots depend on, level by level: first those that depend on no other total."""
        depth: dict[int, int] = {}  # how many totals there are on the longest path to a node, itself included
        needed = _needed(self.nodes, roots)
        for index in sorted(needed):
            node = self.nodes[index]
            depth[index] = max((depth[arg] for arg in node.args), default=0) + (node.op == "total")
        totals = [index for index in sorted(needed) if self.nodes[index].op == "total"]
        deepest = max((depth[index] for index in totals), default=0)
        return [[index for index in totals if depth[index] == level] for level in range(1, deepest + 1)]

    def _cut(
        self,
        name: str,
        stores: Sequence[tuple[str, int]],
        results: Sequence[int],
        phases: tuple[Phase, ...] = (),
        shared: Program | None = None,
    ) -> Program:
        """The Program of some stores and results, in which known totals and shared slots are scalar inputs."""
        graph, new = Graph(), dict[int, int]()
        for index in sorted(_needed(self.nodes, [i for _, i in stores] + list(results), self.totals)):
            node = self.nodes[index]
            if index in self.totals:
                symbol = graph.add(Node("scalar", (), Rate.SHARED, 0, (("name", self.totals[index]),)))
            elif node.op == "load" and node.rate == Rate.SHARED:
                symbol = graph.add(Node("scalar", (), Rate.SHARED, 0, node.attrs))
            elif node.args:
                symbol = graph.operation(node.op, [new[arg] for arg in node.args], dict(node.attrs))
            else:
                symbol = graph.add(node)
            new[index] = symbol.index
        return Program(
            name=name,
            tensors=tuple(tensor for tensor in self.tensors if self.rates.get(tensor) != Rate.SHARED),
            scalars=tuple(node.attr("name") for node in graph.nodes if node.op == "scalar"),
            nodes=tuple(graph.nodes),
            stores=tuple((tensor, new[index]) for tensor, index in stores),
            results=tuple(new[index] for index in results),
            phases=phases,
            shared=shared,
            scalar_tensors=tuple(tensor for tensor in self.tensors if self.rates.get(tensor) == Rate.SCALAR),
        )


def _needed(nodes: Sequence[Node], roots: Iterable[int], known: Collection[int] = ()) -> set[int]:
    """The nodes that ``roots`` depend on, without those that only known nodes depend on."""
    needed: set[int] = set()
    stack = list(roots)
    while stack:
        index = stack.pop()
        if index not in needed:
            needed.add(index)
            stack.extend(() if index in known else nodes[index].args)
    return needed
