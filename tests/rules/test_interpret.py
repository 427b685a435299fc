"""One meaning of a Program on all engines where numbers are at their edge: zero divisors, negative bases, overflow."""

from __future__ import annotations

import weakref
from array import array
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.engines import ENGINES
from lightning_optim.engines.base import Bucket, Layout
from lightning_optim.rules import Policy, Rule, Update
from lightning_optim.rules.interpret import interpret
from lightning_optim.rules.ops import OPS, exp, log, maximum, mean, minimum, norm, sign, sqrt, sum, where
from lightning_optim.rules.trace import trace

from .common import INF, NAN

RUNNING = [name for name, engine in ENGINES.items() if engine.unavailable() is None]
VALUES = [NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-40, 1e-20, -1e20, 3e38, -8.0, -1.0, 0.25, 1.0, 2.0, 3.0]

#: Expressions of a weight, a gradient, and two scalars: lr, a third, and huge, 1e39, which float32 does not hold.
EDGES: dict[str, Any] = {
    "zero by zero, of scalars": lambda p, g, lr, huge: p * ((lr - lr) / (lr - lr)),
    "number by zero": lambda p, g, lr, huge: g / (lr - lr),
    "scalar by zero": lambda p, g, lr, huge: g * (1 / (lr - lr)),
    "number by number": lambda p, g, lr, huge: g / p,
    "root of a negative scalar": lambda p, g, lr, huge: p * sqrt(-lr),
    "negative scalar to a fraction": lambda p, g, lr, huge: p * (-lr) ** 0.3,
    "negative scalar to a whole": lambda p, g, lr, huge: p * (-lr) ** 3.0,
    "zero to the zero": lambda p, g, lr, huge: p * (lr - lr) ** (lr - lr),
    "logarithm of zero": lambda p, g, lr, huge: p * log(lr - lr),
    "overflowing exponential": lambda p, g, lr, huge: p * exp(huge),
    "half": lambda p, g, lr, huge: g**0.5,
    "inverse half": lambda p, g, lr, huge: g**-0.5,
    "square": lambda p, g, lr, huge: g**2.0,
    "cube": lambda p, g, lr, huge: g**3.0,
    "inverse": lambda p, g, lr, huge: g**-1.0,
    "none": lambda p, g, lr, huge: g**0.0,
    "fraction": lambda p, g, lr, huge: g ** (lr * 3.3),
    "a number too large": lambda p, g, lr, huge: g * huge,
    "a number too large, added": lambda p, g, lr, huge: g + huge,
    "a bound too large": lambda p, g, lr, huge: maximum(g, -huge) + minimum(p, huge),
    "divided by too large": lambda p, g, lr, huge: g / huge,
    "a constant too large": lambda p, g, lr, huge: g * 1e300,
    "one scalar of two": lambda p, g, lr, huge: p * where(norm(p) > lr, 1.0, 2.0),
    "one number of two": lambda p, g, lr, huge: where(norm(p) > lr, 1.0, 2.0) + 0 * p,
    "a comparison counts": lambda p, g, lr, huge: (g > p) * 3.0 - (g <= p) / 2.0,
    "share of comparisons": lambda p, g, lr, huge: p * mean(g > 0) + sum(g >= 0) * lr,
    "a number as condition": lambda p, g, lr, huge: where(g, p, 0.5),
    "a ratio of norms": lambda p, g, lr, huge: p * (norm(p * 1e-30) / (norm(p) + 1e-300)),
    "signs": lambda p, g, lr, huge: sign(g) + 2 * sign(-g),
    "the same for all": lambda p, g, lr, huge: 3.0,
    "a scalar for all": lambda p, g, lr, huge: lr,
    "a norm for all": lambda p, g, lr, huge: norm(p),
    "a comparison for all": lambda p, g, lr, huge: lr > 0,
}


def stores(p: Any, g: Any, lr: Any, huge: Any) -> dict[str, Any]:
    return {f"out{index}": edge(p, g, lr, huge) for index, edge in enumerate(EDGES.values())}


def run(engine: str, p: Tensor, g: Tensor) -> list[Tensor]:
    """All of them, by an engine."""
    names = tuple(f"out{index}" for index in range(len(EDGES)))
    program = trace(
        lambda **values: stores(**{k: values[k] for k in ("p", "g", "lr", "huge")}),
        tensors=("p", "g", *names),
        scalars=("lr", "huge"),
        name="edges",
    )
    update = Update(Rule(lambda p, g: g), Policy())
    update.__dict__["program"] = program
    bucket = Bucket(
        update=update,
        layout=Layout(p.dtype, tuple((name, p.dtype) for name in program.tensors)),
        device=torch.device("cpu"),
        tensors={"p": [p], "g": [g], **{name: [torch.full_like(p, 7.0)] for name in names}},
        steps=None,
        groups=array("i", [0]),
        ids=array("i", [0]),
        sizes=(p.numel(),),
    )
    bucket.locate()
    ENGINES[engine].run(bucket, [{"lr": 1 / 3, "huge": 1e39}])
    return [bucket.tensors[name][0] for name in names]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(256,), ()], ids=str)
def test_engines_agree_at_the_edge_of_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    count = len(VALUES)
    ordinary = torch.tensor(VALUES[9:], dtype=dtype).repeat(40)[:256]  # norms that are numbers
    pairs = [
        (torch.tensor(VALUES, dtype=dtype).repeat(count), torch.tensor(VALUES, dtype=dtype).repeat_interleave(count)),
        (ordinary, torch.tensor(VALUES, dtype=dtype).repeat(count)),
        (ordinary * 1e-42, ordinary.flip(0)),
    ]
    for p, g in pairs:
        p, g = (p, g) if shape else (p[-1].clone(), g[5].clone())
        expected = run("eager", p, g)
        for engine in RUNNING[1:]:
            for name, value, right in zip(EDGES, run(engine, p, g), expected, strict=True):
                # A few roundings: libraries of functions differ in the last places.
                torch.testing.assert_close(
                    value,
                    right,
                    rtol=1e-5 if dtype == torch.float32 else 1e-13,
                    atol=2e-44 if dtype == torch.float32 else 0.0,
                    equal_nan=True,
                    msg=lambda text, name=name, engine=engine: f"{name}, {engine}: {text}",  # type: ignore[misc]
                )


def test_memory_is_held_no_longer_than_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(p: Any, g: Any, lr: Any) -> dict[str, Any]:
        for _ in range(20):
            g = g * lr
        return {"p": p - g}

    made: list[weakref.ref[Tensor]] = []
    most = 0

    def product(a: Any, b: Any) -> Tensor:
        nonlocal most
        most = max(most, len([tensor for tensor in made if tensor() is not None]))
        result: Tensor = a * b
        made.append(weakref.ref(result))
        return result

    program = trace(rule, tensors=("p", "g"), scalars=("lr",))
    monkeypatch.setitem(OPS, "mul", replace(OPS["mul"], tensor=product))
    interpret(program, {"p": torch.ones(3), "g": torch.ones(3)}, {"lr": 0.5}, torch.float32)
    assert len(made) == 20
    assert most == 1
