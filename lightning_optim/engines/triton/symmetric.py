"""Symmetric products of batches of matrices: half of the blocks are computed, the others are their transposes.

Importing this module imports Triton, if it is installed; nothing in it can be called without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # tools that import all modules (pytest for doctests, say) need no Triton for that
    triton = tl = None

# 128×128 float32 sums are 64 registers a thread in 8 warps, and three stages of two tiles of 128 rows by 128 bytes are
# 96 KiB of shared memory, which consumer GPUs have too (99 KiB). Compiled for sm_90 by Triton 3.6 and 3.9, aligned
# bfloat16 takes wgmma, 16-byte asynchronous copies and 142 registers, none of them spilled. No GPU has timed it.
BLOCK = 128
DEPTH_BYTES = 128
WARPS = 8
STAGES = 3


def jit(function: Callable[..., None]) -> Any:
    """``triton.jit`` if Triton is installed, else the function itself."""
    return function if triton is None else triton.jit(function)


@jit
def symmetric_kernel(  # type: ignore[no-untyped-def] # Triton reads annotations itself
    x,
    addend,
    out,
    rows,
    depth,
    x_matrix,
    x_row,
    x_column,
    alpha,
    beta,
    HAS_ADDEND: tl.constexpr,  # noqa: N803 - Triton's convention for what is known when compiling
    PRECISION: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
):
    """One program computes one block on or above the diagonal of one matrix of the batch, and stores it twice."""
    blocks = tl.cdiv(rows, BLOCK)
    # The blocks on and above the diagonal as a full rectangle: row `i` has `blocks - i` of them, so that rows `i` and
    # `blocks - 1 - i` together have `blocks + 1` if `blocks` is even. If it is odd, rows `i` and `blocks - i` together
    # have `blocks`, and so has row 0 by itself.
    even = 1 - blocks % 2
    width = blocks + even
    in_matrix = blocks * (blocks + 1) // 2
    matrix = (tl.program_id(0) // in_matrix).to(tl.int64)
    program = tl.program_id(0) % in_matrix
    pair = program // width
    place = program % width
    upper = place >= pair + even
    i = tl.where(upper, pair, blocks - even - pair)
    j = tl.where(upper, place - even, blocks - 1 - place)

    # All offsets have 64 bits: a matrix may have more than 2³¹ elements.
    left_rows = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    right_rows = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = tl.arange(0, DEPTH).to(tl.int64)
    x += matrix * x_matrix
    left = x + left_rows[:, None] * x_row + columns[None, :] * x_column
    right = x + columns[:, None] * x_column + right_rows[None, :] * x_row
    advance = tl.full((), DEPTH, tl.int64) * x_column
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, DEPTH):
        inside = columns < depth - start
        left_tile = tl.load(left, mask=(left_rows < rows)[:, None] & inside[None, :], other=0.0)
        right_tile = tl.load(right, mask=inside[:, None] & (right_rows < rows)[None, :], other=0.0)
        total = tl.dot(left_tile, right_tile, total, input_precision=PRECISION)
        left += advance
        right += advance

    first = matrix * rows * rows
    place_here = first + left_rows[:, None] * rows + right_rows[None, :]
    mask_here = (left_rows < rows)[:, None] & (right_rows < rows)[None, :]
    total *= alpha
    if HAS_ADDEND:
        total += beta * tl.load(addend + place_here, mask=mask_here, other=0.0).to(tl.float32)
    block = total.to(out.dtype.element_ty)
    tl.store(out + place_here, block, mask=mask_here)
    if i != j:
        place_there = first + right_rows[:, None] * rows + left_rows[None, :]
        mask_there = (right_rows < rows)[:, None] & (left_rows < rows)[None, :]
        tl.store(out + place_there, tl.trans(block), mask=mask_there)


#: Whether kernels are run by Triton's interpreter, on tensors of any device, in this process.
INTERPRETED = triton is not None and not isinstance(symmetric_kernel, triton.runtime.JITFunction)


def symmetric_product(
    x: Tensor,
    addend: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    block: int = BLOCK,
    depth: int | None = None,
) -> Tensor:
    """``alpha · x xᵀ + beta · addend`` for each matrix of a batch, summed in float32.

    Args:
        x: ``(batch, rows, columns)``, bfloat16, float16 or float32, on CUDA; any strides.
        addend: ``(batch, rows, rows)`` in the dtype of ``x``, each symmetric: what is below the diagonal is not read.
        alpha: Factor of the product.
        beta: Factor of ``addend``.
        block: Rows and columns of the blocks that are computed at once, a power of 2 from 16.
        depth: Columns of ``x`` that are multiplied at once, a power of 2 from 16; None: what fits best.

    Returns:
        ``(batch, rows, rows)``, contiguous, in the dtype of ``x``.
    """
    batch, rows, columns = x.shape
    out = torch.empty(batch, rows, rows, dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(rows, block)
    grid = (batch * (blocks * (blocks + 1) // 2),)
    if grid[0] == 0:
        return out
    with torch.cuda.device_of(x):  # Triton launches on the current device
        symmetric_kernel[grid](
            x,
            out if addend is None else addend.contiguous(),
            out,
            rows,
            columns,
            *x.stride(),
            alpha,
            beta,
            HAS_ADDEND=addend is not None,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",  # only read for float32
            BLOCK=block,
            DEPTH=depth or DEPTH_BYTES // x.element_size(),
            num_warps=WARPS,
            num_stages=STAGES,
            enable_fp_fusion=True,  # the default differs between versions of Triton
        )
    return out
