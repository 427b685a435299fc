"""The Triton kernel run by Triton's interpreter: ``test_orthogonalize.py`` starts a pytest of its own for this file.

The interpreter must be chosen before Triton is first imported, so nothing here imports it when collected. It rounds
bfloat16 wrongly: float32 only, and small.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_optim.engines.newton_schulz import orthogonalize


def require_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 is not set")
    triton = pytest.importorskip("triton")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version <= (3, 6) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"the loops of Triton {triton.__version__}'s interpreter fail with NumPy {np.__version__}")


def symmetric_product(x: Tensor, addend: Tensor | None = None, **options: float) -> Tensor:
    require_interpreter()
    from lightning_optim.engines.triton import symmetric

    # Blocks of 16, so that small matrices have many, and some at the edge.
    return symmetric.symmetric_product(x, addend, block=16, depth=16, **options)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def close(a: Tensor, b: Tensor) -> None:
    # float32 sums of up to 80 products of about 1, in another order.
    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


# From one block a side to five: even and odd numbers of them, whole and cut, and loops of one to five rounds.
SHAPES = [(1, 1, 1), (2, 5, 80), (3, 16, 16), (2, 31, 33), (2, 48, 16), (1, 50, 7), (2, 80, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("column_major", [False, True])
def test_product(shape: tuple[int, int, int], column_major: bool) -> None:
    x = normal(*shape)
    if column_major:
        x = x.mT.contiguous().mT
    out = symmetric_product(x)
    close(out, x.double() @ x.double().mT)
    assert torch.equal(out, out.mT)


@pytest.mark.parametrize("shape", SHAPES)
def test_addend(shape: tuple[int, int, int]) -> None:
    x = normal(*shape)
    a = x @ x.mT
    close(symmetric_product(x, a, alpha=0.5, beta=-2.0), 0.5 * x.double() @ x.double().mT - 2.0 * a.double())


def test_below_the_diagonal_the_addend_is_not_read() -> None:
    x, a = normal(1, 40, 8), torch.ones(1, 40, 40)
    poisoned = a.clone()
    poisoned[:, 16:, :16] = torch.nan  # the diagonal's own blocks are read whole
    assert torch.equal(symmetric_product(x, poisoned, beta=1.0), symmetric_product(x, a, beta=1.0))


def test_views_and_strides() -> None:
    x = normal(4, 40, 60)[1:3, ::2, 3:24]
    close(symmetric_product(x), x.double() @ x.double().mT)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    x = torch.empty(shape)
    assert torch.equal(symmetric_product(x), x @ x.mT)


@pytest.mark.parametrize("shape", [(2, 37, 21), (130, 150)])
def test_orthogonalize(shape: tuple[int, ...]) -> None:
    require_interpreter()
    x = normal(*shape)
    by_triton = orthogonalize(x, products="triton")
    # Five steps of sums in another order.
    torch.testing.assert_close(by_triton, orthogonalize(x, products="torch"), rtol=0, atol=1e-4)


def test_float64_is_refused() -> None:
    require_interpreter()
    with pytest.raises(ValueError, match="float64"):
        orthogonalize(normal(3, 3).double(), products="triton")
