"""The language: one meaning for each operation on every kind of value, and what tracing makes of a rule."""

from __future__ import annotations

import inspect
import itertools
import math
import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim.engines import ENGINES
from lightning_optim.engines.base import Bucket, Layout
from lightning_optim.engines.foreach import TensorList
from lightning_optim.engines.host import HostEngine
from lightning_optim.optimizers import LAMB, Lion
from lightning_optim.optimizers.adam import ADAM
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.rules import Policy, Program, Rule, Update, ops, trace
from lightning_optim.rules.policy import DECAYS, ROUNDINGS
from lightning_optim.rules.rounding import hash32, noise, noise_key, round_to, stochastic_round
from lightning_optim.rules.trace import Graph, Node, Rate

INF, NAN = math.inf, math.nan
NUMBERS = (-INF, -8.0, -1.0, -0.25, 0.0, 0.5, 1.0, 3.0, 750.0, INF, NAN)
#: Weights on both sides of where lerp changes its formula, and the ends.
WEIGHTS = (-1.0, -0.3, 0.0, 0.3, 0.499, 0.5, 0.7, 1.0, 2.0)

NO_COMPILER = ENGINES["host"].unavailable()
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))


def arguments(op: ops.Op) -> list[tuple[float, ...]]:
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
    op for op in ops.OPS.values() if op.result != "reduction" and op.name not in ("round_to", "stochastic_round")
]
ELEMENTWISE = [op for op in NUMERIC if op.name != "noise_key"]
EACH = pytest.mark.parametrize("op", ELEMENTWISE, ids=lambda op: op.name)


def vector(x: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full((3,), x, dtype=dtype)


def same(actual: Any, expected: float, rtol: float = 1e-14) -> bool:
    value = float(actual)
    if math.isnan(expected) or math.isnan(value):
        return math.isnan(expected) and math.isnan(value)
    return value == expected or (math.isfinite(expected) and abs(value - expected) <= rtol * abs(expected))


def interpret(program: Program, tensors: Mapping[str, Any], scalars: Mapping[str, float]) -> dict[str, Any]:
    """What a Program says, node by node: the meaning that printers must keep."""
    values: list[Any] = []
    for node in program.nodes:
        arguments = [values[arg] for arg in node.args]
        if node.op == "load":
            values.append(tensors[node.attr("name")])
        elif node.op == "scalar":
            values.append(scalars[node.attr("name")])
        elif node.op == "constant":
            values.append(node.attr("value"))
        else:
            values.append(ops.apply(node.op, *arguments, **dict(node.attrs)))
    return {name: values[index] for name, index in program.stores} | {
        f"return {place}": values[index] for place, index in enumerate(program.results)
    }


# ---------------------------------------------------------------- one meaning on every kind of value


@EACH
def test_floats_and_tensors_agree(op: ops.Op) -> None:
    for args in arguments(op):
        expected = float(ops.apply(op.name, *args))
        tensors = [vector(x) for x in args]
        if op.name == "where":
            tensors[0] = tensors[0] > 0
        assert same(ops.apply(op.name, *tensors)[1], expected), args


@EACH
def test_mixtures_of_lists_tensors_and_floats_agree(op: ops.Op) -> None:
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
def test_traced_operations_agree(op: ops.Op, rate: str) -> None:
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
def test_constants_are_folded_to_the_same_number(op: ops.Op) -> None:
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
    # One tensor per case, and one row of the table: a scalar has one value per tensor.
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
        rows=array("i", range(len(cases))),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_lerp_is_torchs_and_exact_at_both_ends(dtype: torch.dtype, weight: float) -> None:
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(100, generator=random, dtype=dtype) for _ in range(2))
    mine = ops.lerp(a, b, weight)
    assert torch.equal(mine, torch.lerp(a, b, weight))
    assert torch.equal(mine, ops.lerp(TensorList([a]), TensorList([b]), weight).tensors[0])
    if weight in (0.0, 1.0):
        assert torch.equal(mine, b if weight else a)
        assert [ops.lerp(x, y, weight) for x, y in zip(a.tolist(), b.tolist(), strict=True)] == mine.tolist()


def test_nan_is_not_swallowed() -> None:
    for f in (ops.maximum, ops.minimum):
        for a, b in ((NAN, 1.0), (1.0, NAN), (NAN, NAN)):
            assert math.isnan(f(a, b))
            assert f(vector(a), vector(b)).isnan().all()
            assert f(vector(a), b).isnan().all()
            assert f(a, vector(b)).isnan().all()
            assert f(TensorList([vector(a)]), b).tensors[0].isnan().all()
            assert f(TensorList([vector(a)]), TensorList([vector(b)])).tensors[0].isnan().all()
    assert ops.sign(NAN) == 0 == float(ops.sign(vector(NAN))[0])


def test_division_by_zero_is_ieees_on_every_kind() -> None:
    for a, b, expected in ((1.0, 0.0, INF), (-1.0, 0.0, -INF), (1.0, -0.0, -INF), (0.0, 0.0, NAN), (NAN, 0.0, NAN)):
        for result in (
            ops.apply("div", a, b),
            (vector(a) / b)[0],
            (a / vector(b))[0],
            (TensorList([vector(a)]) / b).tensors[0][0],
            (a / TensorList([vector(b)])).tensors[0][0],
        ):
            assert same(result, expected), (a, b)


def test_python_numbers_never_raise_where_tensors_do_not() -> None:
    assert math.isnan(ops.sqrt(-1.0))
    assert ops.log(0.0) == -INF
    assert math.isnan(ops.log(-1.0))
    assert ops.exp(1000.0) == INF
    assert ops.apply("pow", 0.0, -1.0) == INF
    assert ops.apply("pow", 1e300, 2.0) == INF
    assert math.isnan(ops.apply("pow", -8.0, 1 / 3))


@pytest.mark.parametrize("name", ["sum", "norm", "mean"])
def test_reductions(name: str) -> None:
    random = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((), (0,), (1,), (4, 5), (1000,))]
    tensors.append(torch.randn(6, 4, generator=random, dtype=torch.float64).t())
    for x, y in zip(tensors, ops.apply(name, TensorList(tensors)).tensors, strict=True):
        flat = [float(v) for v in x.flatten()]
        exact = {
            "sum": math.fsum(flat),
            "norm": math.sqrt(math.fsum(v * v for v in flat)),
            "mean": math.fsum(flat) / max(len(flat), 1),
        }[name]
        assert float(ops.apply(name, x)) == pytest.approx(exact, rel=1e-13, abs=1e-15)
        assert float(y) == pytest.approx(exact, rel=1e-13, abs=1e-15)
        assert y.ndim == 0


def test_a_norm_of_many_float32_is_as_precise_as_float32() -> None:
    x = torch.full((3_000_000,), 0.1)
    exact = math.sqrt(3_000_000) * float(x[0])
    for value in (ops.norm(x), ops.norm(TensorList([x])).tensors[0]):
        assert value.dtype == torch.float32
        assert abs(float(value) - exact) < 2.0**-23 * exact


@pytest.mark.parametrize("name", ["sum", "norm", "mean", "round_to", "stochastic_round"])
def test_what_needs_a_tensor_refuses_numbers(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}\\(\\) .* Python number"):
        ops.apply(name, *[1.0] * ops.OPS[name].arity)


def test_where_of_two_numbers_is_refused() -> None:
    with pytest.raises(TypeError, match=r"where\(condition, 1.0, 0.0\)"):
        ops.where(vector(1.0) > 0, 1.0, 0.0)


def test_every_operator_is_its_operation() -> None:
    a, b = vector(3.0), vector(-2.0)
    x, y = TensorList([a]), TensorList([b])
    pairs = {
        "add": (x + y, x + 2.0, 2.0 + x),
        "sub": (x - y, x - 2.0, 2.0 - x),
        "mul": (x * y, x * 2.0, 2.0 * x),
        "div": (x / y, x / 2.0, 2.0 / x),
        "pow": (x**y, x**2.0, 2.0**x),
        "gt": (x > y, x > 2.0),
        "ge": (x >= y, x >= 2.0),
        "lt": (x < y, x < 2.0),
        "le": (x <= y, x <= 2.0),
        "neg": (-x,),
        "abs": (abs(y),),
    }
    for name, results in pairs.items():
        function = ops.OPS[name].tensor
        operands: list[tuple[Any, ...]] = [(a, b), (a, 2.0), (2.0, a)]
        if ops.OPS[name].arity == 1:
            operands = [(b,) if name == "abs" else (a,)]
        for result, args in zip(results, operands[: len(results)], strict=True):
            assert torch.equal(result.tensors[0], function(*args)), name


# ---------------------------------------------------------------- rounding and its noise


def test_the_hash_is_lowbias32() -> None:
    assert [hash32(x) for x in (0, 1, 0xFFFFFFFF)] == [0, 1753845952, 1734902346]
    assert hash32(1 << 32) == hash32(0)
    assert len({hash32(x) for x in range(100_000)}) == 100_000  # a bijection


def test_noise_belongs_to_places_in_memory() -> None:
    """The bits of an element depend on where it lies, not on the shape or strides it is seen with."""
    key = noise_key(0.0, 1.0, 2.0, 3.0)
    flat = noise(torch.empty(24), key)
    assert [int(x) for x in flat[:3]] == [hash32(i ^ hash32(int(key))) for i in range(3)]
    assert torch.equal(noise(torch.empty(4, 6), key).flatten(), flat)
    assert torch.equal(noise(torch.empty(4, 6).t(), key), flat.view(4, 6).t())
    last = torch.empty(2, 3, 2, 2).to(memory_format=torch.channels_last)
    assert torch.equal(noise(last, key).permute(0, 2, 3, 1).flatten(), flat)
    assert noise(torch.empty(()), key).shape == ()
    assert noise(torch.empty(0, 3), key).shape == (0, 3)
    assert noise(torch.empty(6, 8)[:, ::2], key).shape == (6, 4)


def test_noise_keys_differ_in_each_part() -> None:
    parts = list(itertools.product(range(4), range(4), range(1, 5), range(3)))
    assert len({noise_key(*map(float, p)) for p in parts}) == len(parts)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_rounded_tensor_has_noise_of_its_own(name: str) -> None:
    """A slot and the weight must not be rounded up together."""
    rule = OPTIMIZERS[name].cls.rule
    flags = dict.fromkeys(rule.flags, True)
    slots = rule.slots(flags)
    policy = Policy(rounding="stochastic", weight_dtype="bfloat16", low_precision_slots=slots)
    nodes = Update(rule, policy, tuple(sorted(flags.items()))).program.nodes
    assert sum(node.op == "stochastic_round" for node in nodes) == 1 + len(slots)
    assert sum(node.op == "noise_key" for node in nodes) == 1 + len(slots)


def test_stochastic_rounding_goes_to_a_neighbour_and_leaves_what_is_exact() -> None:
    random = torch.Generator().manual_seed(2)
    x = torch.cat([torch.randn(5000, generator=random), torch.randn(500, generator=random) * 1e-39])
    rounded = stochastic_round(x, noise_key(0.0, 0.0, 1.0, 0.0))
    towards_zero = (x.view(torch.int32) & -0x10000).view(torch.float32)
    away = (towards_zero.view(torch.int32) + 0x10000).view(torch.float32)
    assert ((rounded == towards_zero) | (rounded == away)).all()
    exact = x.to(torch.bfloat16).float()
    assert torch.equal(stochastic_round(exact, 77.0), exact)
    special = torch.tensor([NAN, INF, -INF, 0.0])
    assert torch.equal(stochastic_round(special, 5.0).nan_to_num(9.0, 8.0, 7.0), special.nan_to_num(9.0, 8.0, 7.0))
    with pytest.raises(TypeError, match=r"float32 math, not torch\.float64"):
        stochastic_round(x.double(), 1.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_round_to_keeps_the_math_type(dtype: str) -> None:
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)
    assert torch.equal(round_to(x, dtype), x.to(getattr(torch, dtype)).double())
    assert round_to(x, dtype).dtype == torch.float64


# ---------------------------------------------------------------- tracing

LION = """\
lion(p, g, exp_avg; lr, beta1, beta2, weight_decay)
  %0 = load name='p'  # element, stage 0
  %1 = load name='g'  # element, stage 0
  %2 = load name='exp_avg'  # element, stage 0
  %3 = scalar name='lr'  # scalar, stage 0
  %4 = scalar name='beta1'  # scalar, stage 0
  %5 = scalar name='beta2'  # scalar, stage 0
  %6 = scalar name='weight_decay'  # scalar, stage 0
  %7 = mul %3 %6  # scalar, stage 0
  %8 = constant value=1.0 repr='1.0'  # constant, stage 0
  %9 = sub %8 %7  # scalar, stage 0
  %10 = mul %0 %9  # element, stage 0
  %11 = sub %8 %4  # scalar, stage 0
  %12 = lerp %2 %1 %11  # element, stage 0
  %13 = sign %12  # element, stage 0
  %14 = mul %3 %13  # element, stage 0
  %15 = sub %8 %5  # scalar, stage 0
  %16 = lerp %2 %1 %15  # element, stage 0
  %17 = sub %10 %14  # element, stage 0
  store p %17
  store exp_avg %16"""


def test_the_program_of_lion() -> None:
    assert str(Update(Lion.rule, Policy(decay="decoupled")).program) == LION


def updates() -> list[Update]:
    """Every optimizer's rule under all its flags and many policies."""
    found = {}
    for info in OPTIMIZERS.values():
        rule = info.cls.rule
        for values in itertools.product((False, True), repeat=len(rule.flags)):
            flags = tuple(sorted(zip(rule.flags, values, strict=True)))
            for policy in (
                Policy(),
                Policy(decay="decoupled", cautious=True, scaled=True, copy=True),
                Policy(decay="l2", maximize=True, rounding="kahan", weight_dtype="bfloat16"),
                Policy(decay="proximal", rounding="stochastic", weight_dtype="bfloat16"),
            ):
                update = Update(rule, policy, flags)
                found[update] = update
    return list(found)


@pytest.mark.parametrize("update", updates(), ids=lambda u: f"{u.rule.name}-{len(u.flags)}-{u.policy.decay}")
def test_programs_are_well_formed(update: Update) -> None:
    program = update.program
    for index, node in enumerate(program.nodes):
        assert all(arg < index for arg in node.args), "an operand comes after its use"
        if node.rate == Rate.ELEMENT and node.op in ops.OPS:
            operands = [program.nodes[arg] for arg in node.args]
            assert any(operand.rate == Rate.ELEMENT for operand in operands), f"%{index} belongs out of the loop"
    assert len({(n.op, n.args, n.attrs) for n in program.nodes}) == len(program.nodes), "a subexpression twice"
    used = {arg for node in program.nodes for arg in node.args} | {i for _, i in program.stores} | {*program.results}
    assert used == set(range(len(program.nodes))), "dead code"
    assert {name for name, _ in program.stores} == set(update.tensors) - {"g"}
    done: set[int] = set()
    for sweep in program.passes:
        done |= set(sweep.scalars)
        assert set(sweep.inputs) <= done, "a loop reads a scalar that is not there yet"
        done |= set(sweep.reductions)
        assert all(program.nodes[i].rate == Rate.ELEMENT for i in sweep.elements)
    assert all(not sweep.reductions for sweep in program.passes[-1:])
    assert all(sweep.reductions for sweep in program.passes[:-1])


@pytest.mark.parametrize("update", updates(), ids=lambda u: f"{u.rule.name}-{len(u.flags)}-{u.policy.decay}")
def test_a_program_says_what_its_rule_does(update: Update) -> None:
    random = torch.Generator().manual_seed(3)
    values: dict[str, Any] = {
        name: torch.rand(4, 5, generator=random) + 0.1 for name in update.tensors if name != "copy"
    }
    scalars = {
        **dict.fromkeys(update.rule.scalars, 0.3),
        "lr": 0.01,
        "weight_decay": 0.1,
        "grad_scale": 0.5,
        "seed": 0.0,
        "tensor_id": 2.0,
        "step": 3.0,
    }
    expected = update.run(**values, **scalars)
    result = interpret(update.program, values, scalars)
    assert set(result) == set(expected)
    for name, value in expected.items():
        assert torch.equal(result[name], value), name


def test_scalars_are_hoisted_and_shared() -> None:
    program = Update(ADAM, Policy(decay="decoupled"), (("amsgrad", False),)).program
    assert len(program.passes) == 1
    elements = [program.nodes[i] for i in program.passes[0].elements]
    assert [node.op for node in elements if node.op in ("pow", "exp", "log")] == []
    assert len([node for node in elements if node.op == "sqrt"]) == 1  # the bias corrections' roots are scalars
    assert len([node for node in elements if node.op == "div"]) == 1  # by the denominator
    assert "step" in program.scalars
    assert "grad_scale" not in program.scalars


def test_common_subexpressions_are_one_and_dead_code_is_none() -> None:
    def rule(p: Any, g: Any, unused: Any, lr: Any, eps: Any) -> dict[str, Any]:
        lost = g / eps
        del lost
        return {"p": p - lr * (g * g) + (g * g) * lr * 0}

    program = trace(rule, tensors=("p", "g", "unused"), scalars=("lr", "eps"))
    assert program.scalars == ("lr",)
    assert program.loads == ("p", "g")
    assert sum(node.op == "mul" and node.args == (1, 1) for node in program.nodes) == 1
    assert "div" not in [node.op for node in program.nodes]
    assert program.tensors == ("p", "g", "unused")  # the calling convention stays


def test_negative_zero_is_not_zero() -> None:
    def rule(p: Any, a: Any) -> dict[str, Any]:
        return {"p": p * 0.0, "a": p * -0.0}

    program = trace(rule, tensors=("p", "a"), scalars=())
    assert len({index for _, index in program.stores}) == 2


def test_lamb_has_two_passes_and_stores_in_the_last() -> None:
    program = Update(LAMB.rule, Policy(), (("adapt", True),)).program
    first, last = program.passes
    assert [program.nodes[i].op for i in first.reductions] == ["norm", "norm"]
    assert last.reductions == ()
    stored = {index for _, index in program.stores}
    assert stored <= set(last.elements)
    # Only what the norms need is computed in the first pass; nothing that depends on them.
    assert max(program.nodes[i].stage for i in first.elements) == 0
    assert stored - set(first.elements), "the weight depends on the norms"
    assert program.reduces
    assert not Update(LAMB.rule, Policy(), (("adapt", False),)).program.reduces


def test_cautious_waits_for_its_own_mean() -> None:
    assert len(Update(ADAM, Policy(cautious=True), (("amsgrad", False),)).program.passes) == 2
    assert len(Update(LAMB.rule, Policy(cautious=True), (("adapt", True),)).program.passes) == 3


def test_results_are_returned() -> None:
    program = trace(lambda g: {"return": [ops.norm(g), ops.sum(g)]}, tensors=("g",), scalars=(), name="f")
    result = interpret(program, {"g": torch.tensor([3.0, 4.0])}, {})
    assert [float(x) for x in result.values()] == [5.0, 7.0]
    assert program.stores == ()


@pytest.mark.parametrize("where", ["element", "scalar"])
def test_a_branch_on_a_value_is_refused(where: str) -> None:
    def rule(p: Any, g: Any, lr: Any) -> dict[str, Any]:
        if (g if where == "element" else lr) > 0:
            return {"p": p}
        return {"p": p - g}

    with pytest.raises(TypeError, match="cannot branch on the value"):
        trace(rule, tensors=("p", "g"), scalars=("lr",))


def test_mistakes_in_rules_are_named() -> None:
    def traced(function: Callable[..., Any]) -> Program:
        return trace(function, tensors=("p", "g"), scalars=("lr",), name="rule")

    with pytest.raises(ValueError, match=r"unknown operation 'frobnicate'; the language has: add, sub"):
        traced(lambda p, g, lr: {"p": ops.apply("frobnicate", p)})
    with pytest.raises(KeyError, match="frobnicate"):
        ops.apply("frobnicate", vector(1.0))
    with pytest.raises(ValueError, match=r"stores \['momentum'\], but its tensors are \['p', 'g'\]"):
        traced(lambda p, g, lr: {"momentum": p})
    with pytest.raises(TypeError, match=r"norm\(\) reduces a tensor; it was given a scalar"):
        traced(lambda p, g, lr: {"p": p * ops.norm(lr)})
    with pytest.raises(TypeError, match="one branch must be element-wise"):
        traced(lambda p, g, lr: {"p": p * ops.where(g > 0, 1.0, lr)})


FINGERPRINTS = """
import itertools
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.rules import Policy, Update
for info in OPTIMIZERS.values():
    rule = info.cls.rule
    for values in itertools.product((False, True), repeat=len(rule.flags)):
        flags = tuple(sorted(zip(rule.flags, values)))
        print(Update(rule, Policy(decay="l2", cautious=True, scaled=True, copy=True), flags).program.fingerprint)
"""


def test_fingerprints_are_the_same_in_every_process() -> None:
    seen = []
    for seed in ("0", "12345"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", FINGERPRINTS], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        seen.append(run.stdout.split())
    assert seen[0] == seen[1]
    assert all(len(fingerprint) == 64 for fingerprint in seen[0])


def test_fingerprints_tell_programs_apart() -> None:
    seen: dict[str, Update] = {}
    for update in updates():
        other = seen.setdefault(update.program.fingerprint, update)
        assert str(other.program) == str(update.program)
    assert len({str(update.program) for update in updates()}) == len(seen)


def test_nodes_know_their_attributes() -> None:
    node = Node("load", (), Rate.ELEMENT, 0, (("name", "p"),))
    assert node.attr("name") == "p"
    with pytest.raises(KeyError):
        node.attr("dtype")


# ---------------------------------------------------------------- rules and policies


def test_a_rules_signature_is_its_declaration() -> None:
    def rule(p: Any, g: Any, a: Any, b: Any = None, *, lr: Any, step: Any, extra: bool) -> Any:
        return (g, a, b) if extra else (g, a)

    declared = Rule(rule, optional={"b": "extra"})
    assert declared.name == "rule"
    assert declared.all_slots == ("a", "b")
    assert declared.slots({"extra": False}) == ("a",)
    assert declared.slots({"extra": True}) == ("a", "b")
    assert declared.scalars == ("lr", "step")
    assert declared.flags == ("extra",)
    assert declared.counts_steps
    assert not Lion.rule.counts_steps


def no_gradient(p: Any, *, lr: Any) -> Any: ...
def wrong_order(g: Any, p: Any, *, lr: Any) -> Any: ...
def variadic(p: Any, g: Any, *slots: Any, lr: Any) -> Any: ...
def keywords(p: Any, g: Any, **scalars: Any) -> Any: ...


@pytest.mark.parametrize("function", [no_gradient, wrong_order, variadic, keywords])
def test_a_signature_that_is_no_rules_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=rf"a rule's signature is \(p, g, .* {function.__name__} has \("):
        Rule(function)


@pytest.mark.parametrize("optional", [{"b": "extra"}, {"a": "lr"}, {"p": "extra"}])
def test_optional_slots_must_be_slots_and_flags(optional: dict[str, str]) -> None:
    def rule(p: Any, g: Any, a: Any = None, *, lr: Any, extra: bool) -> Any: ...

    with pytest.raises(TypeError, match=r"the slots of rule are \['a'\], its flags \['extra'\]"):
        Rule(rule, optional=optional)


def test_the_number_of_returned_values_is_checked() -> None:
    def forgets(p: Any, g: Any, a: Any, *, lr: Any) -> Any:
        return lr * g

    with pytest.raises(TypeError, match=r"forgets must return the update and 1 slots \['a'\]; it returned 1 values"):
        Update(Rule(forgets), Policy()).program  # noqa: B018 - tracing is what raises


@pytest.mark.parametrize("options", [{"decay": "l1"}, {"rounding": "up"}])
def test_unknown_policies_are_refused(options: dict[str, Any]) -> None:
    valid = DECAYS if "decay" in options else ROUNDINGS
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}='{value}'; valid: {', '.join(valid)}"):
        Policy(**options)


def test_kahan_needs_a_slot_only_where_weights_are_rounded() -> None:
    for dtype, slots in (("bfloat16", ("exp_avg", "kahan_compensation")), ("float32", ("exp_avg",))):
        assert Update(Lion.rule, Policy(rounding="kahan", weight_dtype=dtype)).slots == slots


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rules_are_pure(name: str) -> None:
    """A rule does not change what it is given: engines read it again."""
    rule = OPTIMIZERS[name].cls.rule
    flags = dict.fromkeys(rule.flags, True)
    values = {slot: torch.rand(5) for slot in ("p", "g", *rule.slots(flags))}
    kept = {slot: value.clone() for slot, value in values.items()}
    rule(values["p"], values["g"], {s: values[s] for s in rule.slots(flags)}, dict.fromkeys(rule.scalars, 0.5), flags)
    for slot, value in values.items():
        assert torch.equal(value, kept[slot]), slot


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_scalar_of_a_rule_is_an_option(name: str) -> None:
    cls = OPTIMIZERS[name].cls
    group = OPTIMIZERS[name].create([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]
    assert set(cls.rule.scalars) - {"step"} <= set(cls.scalars(group))
    assert set(cls.flags(group, group["params"][0], True)) == set(cls.rule.flags)
    assert "params" not in inspect.signature(cls.rule.function).parameters


def swap(p: Any, g: Any, a: Any, b: Any, *, lr: Any) -> Any:
    """A rule that stores what it loaded, elsewhere."""
    return lr * g, b, a


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.unavailable() is None])
def test_all_loads_come_before_all_stores(engine: str) -> None:
    update = Update(Rule(swap), Policy())
    tensors = {name: [torch.full((5,), float(i)), torch.full((2,), float(i))] for i, name in enumerate(update.tensors)}
    bucket = Bucket(
        update=update,
        layout=Layout(torch.float32, tuple((name, torch.float32) for name in update.tensors)),
        device=torch.device("cpu"),
        tensors=tensors,
        steps=None,
        rows=array("i", [0, 0]),
        ids=array("i", [0, 1]),
        sizes=(5, 2),
    )
    bucket.locate()
    ENGINES[engine].run(bucket, [{"lr": 2.0}])
    assert {name: float(column[1][0]) for name, column in tensors.items()} == {"p": -2.0, "g": 1.0, "a": 3.0, "b": 2.0}
