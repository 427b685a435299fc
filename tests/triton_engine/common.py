"""Compiling the kernels of every rule without a GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim.engines.base import Bucket
from lightning_optim.registry import OPTIMIZERS, create_optimizer

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

#: Types of the kernels' arguments, by name.
ARGUMENTS = {
    "pointers": "*i64",
    "numel": "*i64",
    "groups": "*i32",
    "ids": "*i32",
    "table": "*fp64",
    "squares": "*fp64",
    "loss_scale": "*fp32",
    "found_inf": "*fp32",
    "max_norm": "*fp64",
    "work": "*fp64",
    "partials": "*fp64",
    "skip": "*i32",
    "chunk_tensor": "*i32",
    "chunk_begin": "*i64",
    "first_chunk": "*i32",
    "n": "i32",
    "stride": "i32",
    "parts": "i32",
}


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel.

    Attributes:
        loads, stores: Bytes that a thread moves by each instruction that reads or writes global memory as a vector.
        registers: Of each thread, or None if there is no tool here to tell.
        spills: Bytes of local memory.
    """

    loads: tuple[int, ...]
    stores: tuple[int, ...]
    registers: int | None
    spills: int


def programs() -> list[str]:
    """What there is to compile: each optimizer's rule, or the parts of it."""
    return [
        program
        for name, info in OPTIMIZERS.items()
        for program in ([f"{name} direction", f"{name} move"] if info.kind == "matrix" else [name])
        if not bucket(program, torch.float32).update.program.has_sides  # which only torch's own operators run
    ]


def bucket(program: str, dtype: torch.dtype, **options: Any) -> Bucket:
    """The bucket of one weight."""
    name, _, part = program.partition(" ")
    copies = options.pop("copies", False) or part == "direction"
    weight = torch.nn.Parameter(torch.zeros(3, 4, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    optimizer = create_optimizer(name, [weight], engine="eager", **options)
    stepper: Any = optimizer._stepper
    planner = (stepper if not part else stepper._direct if part == "direction" else stepper._move).planner
    members = planner.members([weight.grad])
    return planner.build(members, [weight.grad], {weight: weight.bfloat16()} if copies else None, True)[0].bucket


def compiled(kernel: Any, constants: dict[str, Any], **options: Any) -> Compiled:
    """Compile a kernel for an H100 or H200, as its first launch there would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else ARGUMENTS[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={},
    )
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = result.asm["ptx"]

    def widths(instruction: str) -> tuple[int, ...]:
        found = re.findall(rf"{instruction}\.global(?:\.\w+|::\w+)*?\.v(\d)\.b(\d+)", ptx)
        return tuple(sorted(int(count) * int(size) // 8 for count, size in found))

    registers, spills = _resources(result.asm["cubin"])
    return Compiled(widths("ld"), widths("st"), registers, spills)


def _resources(cubin: bytes) -> tuple[int | None, int]:
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers = re.search(r"REG:(\d+)", shown.stdout)
    local = re.search(r"LOCAL:(\d+)", shown.stdout)
    assert registers is not None, shown.stdout
    return int(registers[1]), int(local[1]) if local else 0
