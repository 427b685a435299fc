"""One meaning for each operation on every kind of value: numbers, tensors, lists, traced and compiled."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_optim.engines import ENGINES
from lightning_optim.engines.base import Bucket, Layout
from lightning_optim.engines.foreach import TensorList
from lightning_optim.engines.host.engine import HostEngine
from lightning_optim.rules import Policy, Rule, Update, ops, trace
from lightning_optim.rules.table import Op
from lightning_optim.rules.trace import Graph

from .common import INF, NAN, NUMBERS, WEIGHTS, interpret, same, vector

NO_COMPILER = ENGINES["host"].unavailable()
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))


def arguments(op: Op) -> list[tuple[float, ...]]:
    """Operands with which an operation is tested."""
    if op.name == "lerp":
        return list(itertools.product((-INF, -2.0, 0.0, 1.0, 3.0, NAN), (-2.0, 0.0, 3.0, INF), WEIGHTS))
    if op.name == "where":
        return list(itertools.product((0.0, 1.0), NUMBERS[::2], NUMBERS[1::2]))
    if op.name == "noise_key":
        return [(0.0, 0.0, 1.0, 0.0), (0.0, 3.0, 1.0, 2.0), (7.0, 1.0, 16777215.0, 1.0), (4294967295.0, 9.0, 5.0, 3.0)]
    found = list(itertools.product(NUMBERS, repeat=op.arity))
    # torch takes the square root for an exponent of a half, and says NaN where pow() says infinity.
    return [args for args in found if not (op.name == "pow" and args == (-INF, 0.5))]


#: Operations on numbers; those that round or reduce have tests of their own.
NUMERIC = [
    op
    for op in ops.OPS.values()
    if op.result not in ("reduction", "total") and op.name not in ("round_to", "stochastic_round")
]
ELEMENTWISE = [op for op in NUMERIC if op.name != "noise_key"]
EACH = pytest.mark.parametrize("op", ELEMENTWISE, ids=lambda op: op.name)


@EACH
def test_floats_and_tensors_agree(op: Op) -> None:
    for args in arguments(op):
        expected = float(ops.apply(op.name, *args))
        tensors = [vector(x) for x in args]
        if op.name == "where":
            tensors[0] = tensors[0] > 0
        assert same(ops.apply(op.name, *tensors)[1], expected), args


@EACH
def test_mixtures_of_lists_tensors_and_floats_agree(op: Op) -> None:
    """Every operand a Python number, a 0-dim tensor (a scalar on a device) or a list of tensors, in all mixtures."""
    kinds: dict[str, Callable[[float], Any]] = {
        "float": float,
        "scalar tensor": lambda x: torch.tensor(x, dtype=torch.float64),
        "list": lambda x: TensorList([vector(x), vector(x)[:1]]),
    }
    tried = arguments(op)[:: 1 if op.arity == 1 else 5]
    for mixture in itertools.product(kinds, repeat=op.arity):
        if "list" not in mixture or (op.name == "where" and mixture[0] != "list"):
            continue
        for args in tried:
            operands = [kinds[kind](x) for kind, x in zip(mixture, args, strict=True)]
            if op.name == "where":
                operands[0] = operands[0] > 0
                if mixture[1:] in (("float", "float"),):
                    with pytest.raises(TypeError, match="one of the two branches must be a tensor"):
                        ops.apply(op.name, *operands)
                    continue
            result = ops.apply(op.name, *operands)
            assert [len(tensor) for tensor in result.tensors] == [3, 1]
            expected = float(ops.apply(op.name, *args))
            assert all(same(tensor[0], expected) for tensor in result.tensors), (mixture, args)


@EACH
@pytest.mark.parametrize("rate", ["scalars", "elements"])
def test_traced_operations_agree(op: Op, rate: str) -> None:
    names = [f"x{i}" for i in range(op.arity)]

    def rule(**values: Any) -> dict[str, Any]:
        operands = [values[name] for name in names]
        if op.name == "where":
            operands[0] = operands[0] > 0
        return {"out": ops.apply(op.name, *operands)}

    loads = names if rate == "elements" else []
    program = trace(rule, tensors=("out", *loads), scalars=names if rate == "scalars" else ())
    for args in arguments(op):
        inputs = dict(zip(names, args, strict=True))
        expected = float(ops.apply(op.name, *args))
        if rate == "scalars":
            result = interpret(program, {}, inputs)["out"]
        else:
            result = interpret(program, {name: vector(x) for name, x in inputs.items()}, {})["out"][0]
        assert same(result, expected), args


@pytest.mark.parametrize("op", [op for op in NUMERIC if op.name != "where"], ids=lambda op: op.name)
def test_constants_are_folded_to_the_same_number(op: Op) -> None:
    for args in arguments(op)[::3]:
        graph = Graph()
        symbol = graph.constant(args[0]).__rule_op__(op.name, args, {})
        node = graph.nodes[symbol.index]
        assert node.op == "constant"
        assert same(node.attr("value"), float(ops.apply(op.name, *args)))


@needs_compiler
@pytest.mark.parametrize("math_type", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_compiled_operations_agree(math_type: torch.dtype) -> None:
    """All operations in one kernel, each on elements and on scalars, against the table."""

    def rule(**values: Any) -> dict[str, Any]:
        stores = {}
        for op in ELEMENTWISE:
            for form in ("element", "scalar"):
                prefix = "e" if form == "element" else "s"
                operands = [values[f"{prefix}{i}"] for i in range(op.arity)]
                if op.name == "where":
                    operands[0] = operands[0] > 0
                # A comparison has no storage type of its own: it is stored as the number that a selection makes of it.
                value = ops.apply(op.name, *operands)
                if op.result == "bool":
                    value = ops.where(value, values["one"], 0.0) if form == "element" else value
                stores[f"{form} {op.name}"] = value
        return stores

    outputs = [f"{form} {op.name}" for op in ELEMENTWISE for form in ("element", "scalar")]
    names = {name: f"out{i}" for i, name in enumerate(outputs)}
    tensors = ("e0", "e1", "e2", "one", *names.values())
    program = trace(
        lambda **v: {names[k]: x for k, x in rule(**v).items()}, tensors=tensors, scalars=("s0", "s1", "s2"), name="all"
    )
    cases = {args for op in ELEMENTWISE for args in ((*a, 1.0, 1.0)[:3] for a in arguments(op))}
    engine = HostEngine()
    # One tensor per case, and one group of the table: a scalar has one value per tensor.
    columns = {name: [vector(NAN, math_type) for _ in cases] for name in names.values()}
    columns |= {f"e{i}": [vector(args[i], math_type) for args in cases] for i in range(3)}
    columns["one"] = [vector(1.0, math_type) for _ in cases]
    update = Update(Rule(lambda p, g: g), Policy())
    update.__dict__["program"] = program
    bucket = Bucket(
        update=update,
        layout=Layout(math_type, tuple((name, math_type) for name in tensors)),
        device=torch.device("cpu"),
        tensors=columns,
        steps=None,
        groups=array("i", range(len(cases))),
        ids=array("i", [0] * len(cases)),
        sizes=(3,) * len(cases),
    )
    bucket.locate()
    engine.run(bucket, [dict(zip(("s0", "s1", "s2"), args, strict=True)) for args in cases])
    # A rounding of each operation, and one or two of the last place that libraries of functions differ by.
    rtol = 4 * torch.finfo(math_type).eps
    for op in ELEMENTWISE:
        wanted = {(*a, 1.0, 1.0)[:3]: a for a in arguments(op)}
        for index, case in enumerate(cases):
            if case not in wanted:
                continue
            expected_wide = float(ops.apply(op.name, *wanted[case]))
            operands = [vector(x, math_type) for x in wanted[case]]
            if op.name == "where":
                operands[0] = operands[0] > 0
            expected = float(ops.apply(op.name, *operands)[1])
            element = columns[names[f"element {op.name}"]][index]
            assert all(same(x, expected, rtol) for x in element), (op.name, case, element, expected)
            scalar = float(columns[names[f"scalar {op.name}"]][index][0])
            stored = float(torch.tensor(expected_wide, dtype=torch.float64).to(math_type))
            assert same(scalar, stored, rtol), (op.name, case)
