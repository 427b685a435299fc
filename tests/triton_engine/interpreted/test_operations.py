"""The operations that Triton lacks, as the generated modules define them, against torch's."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.engines.triton.prelude import PRELUDE
from lightning_optim.engines.triton.printer import TritonPrinter
from lightning_optim.rules import ops

NUMBERS = [0.0, -0.0, 1e-30, -1e-30, 0.05, 0.3, -0.4, 0.42, -0.99, 1.0, -1.0, 1.7, -2.4, 30.0, -1e20]
NUMBERS += [math.inf, -math.inf, math.nan]

OPERATIONS: dict[str, Callable[..., Tensor]] = {"atan2": torch.atan2, "tanh": torch.tanh, "sign": torch.sign}

KERNEL = """

@triton.jit
def kernel({pointers}, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, {name}({loads}))
"""


def on_triton(name: str, operands: list[Tensor], folder: Path) -> Tensor:
    names = [f"x{number}" for number in range(len(operands))]
    loads = ", ".join(f"tl.load({operand} + index)" for operand in names)
    source = folder / f"{name}.py"
    source.write_text(PRELUDE + KERNEL.format(pointers=", ".join(names), name=name, loads=loads))
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = torch.empty_like(operands[0])
    module.kernel[(1,)](*operands, out, SIZE=out.numel())
    return out


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_as_torch_has_it(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pairs = list(itertools.product(NUMBERS, repeat=ops.OPS[name].arity))
    pairs += [pairs[0]] * (2 ** math.ceil(math.log2(len(pairs))) - len(pairs))  # a block has a power of two
    operands = [torch.tensor(column, dtype=dtype) for column in zip(*pairs, strict=True)]
    expected = OPERATIONS[name](*operands)
    found = on_triton(name, operands, tmp_path)
    # A handful of roundings, one after another.
    torch.testing.assert_close(found, expected, rtol=8 * torch.finfo(dtype).eps, atol=0, equal_nan=True)
    if name == "atan2":  # on which side of its cut
        assert torch.equal(found.signbit() | found.isnan(), expected.signbit() | expected.isnan())


def test_every_operation_is_printed() -> None:
    """But those that round, which elements alone have, and a total, which ends a Program."""
    assert set(TritonPrinter.scalar_templates) == set(ops.OPS) - {"total", "round_to", "stochastic_round"}
