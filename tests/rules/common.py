"""What the tests of the language share: values, their comparison, and an interpreter of programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.rules import Program, ops

INF, NAN = math.inf, math.nan
NUMBERS = (-INF, -8.0, -1.0, -0.25, 0.0, 0.5, 1.0, 3.0, 750.0, INF, NAN)
#: Weights on both sides of where lerp changes its formula, and the ends.
WEIGHTS = (-1.0, -0.3, 0.0, 0.3, 0.499, 0.5, 0.7, 1.0, 2.0)


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
