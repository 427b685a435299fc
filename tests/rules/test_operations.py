"""The operations one by one: their edge cases, their operators, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_optim.engines.foreach import TensorList
from lightning_optim.rules import ops

from .common import INF, NAN, WEIGHTS, same, vector


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
