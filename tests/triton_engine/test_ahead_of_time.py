"""Every rule compiles for an H100 or H200 without one, reads memory as vectors, and keeps its registers few."""

from __future__ import annotations

from typing import Any

import pytest
import references
import torch

from lightning_optim.registry import OPTIMIZERS

from .common import bucket, compiled, needs_triton, programs

pytestmark = needs_triton

#: Storage types and policies that print differently.
LAYOUTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "kahan": {"dtype": torch.bfloat16, "rounding": "kahan"},
    "stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic", "state_dtype": "bfloat16"},
    "float64": {"dtype": torch.float64},
    "cautious": {"dtype": torch.float32, "cautious": True},
    "copies": {"dtype": torch.float32, "copies": True},
}

#: To keep its memory busy, an H200 needs about 4.8 TB/s × 600 ns = 2.9 MB in flight, 22 KB on each of 132 SMs. With
#: 65,536 registers on each, this many leave room for 512 threads, which have 64 bytes in flight each: 32 KB.
MOST_REGISTERS = 128
#: What rules in float32 without further policy stay under: room for 1,024 threads. Those that read more than
#: ``FEW_ARRAYS`` may have as many as others: each thread has more bytes in flight.
MOST_REGISTERS_PLAIN = 64
FEW_ARRAYS = 4


@pytest.mark.matrix(
    unless=lambda name, layout: (
        layout == "float32" or (references.representative(name.split()[0]) and layout == "stochastic")
    )
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", programs())
def test_every_rule_compiles_to_vector_instructions(name: str, layout: str) -> None:
    from lightning_optim.engines.triton import engine
    from lightning_optim.engines.triton.build import build

    options = LAYOUTS[layout]
    if "cautious" in options and "cautious" not in OPTIMIZERS[name.split()[0]].options:
        pytest.skip("does not have the option")
    case = bucket(name, **options)
    program, types = case.update.program, dict(case.layout.dtypes)
    if program.has_sides:
        pytest.skip("rows and columns need torch's own operators")
    kernels = build(program, case.layout)
    for stage, kernel in enumerate(kernels.scalars):
        flags = (
            {"CLIP": True, "UNSCALE": True, "CHECK": True, "SKIP": True, "PARTS": engine.PARTS} if stage == 0 else {}
        )
        assert compiled(kernel, {**flags, "LANES": engine.LANES}, enable_fp_fusion=True).spills == 0
    for stage, kernel in enumerate(kernels.sweeps):
        result = compiled(kernel, {"CHUNK": engine.CHUNK, "BLOCK": engine.BLOCK}, **engine.OPTIONS)
        sweep = program.passes[stage]
        read = [program.nodes[i].attr("name") for i in sweep.elements if program.nodes[i].op == "load"]
        written = [tensor for tensor, _ in program.element_stores] if stage == len(kernels.sweeps) - 1 else []
        # A thread has BLOCK / (32 * warps) neighbouring elements: four, in as few instructions as 16 bytes allow.
        share = engine.BLOCK // (32 * engine.OPTIONS["num_warps"])
        for names, moved in ((read, result.loads), (written, result.stores)):
            wanted = sorted(
                min(16, share * types[name].itemsize)
                for name in names
                for _ in range(-(-share * types[name].itemsize // 16))
            )
            times = len(moved) // len(wanted) if wanted else 1  # LLVM unrolls short loops
            assert list(moved) == sorted(wanted * times), (kernel.fn.__name__, names)
        assert result.spills == 0
        if result.registers is not None:
            plain = layout in ("float32", "bfloat16") and len(read) <= FEW_ARRAYS
            most = MOST_REGISTERS_PLAIN if plain else MOST_REGISTERS
            assert result.registers <= most, kernel.fn.__name__
