"""The generated C: without warnings, the same in every run, and complete."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import references
import torch
from torch import Tensor, nn

from lightning_optim.engines.base import Layout
from lightning_optim.engines.host import toolchain as toolchains
from lightning_optim.engines.host.printer import CPrinter
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.rules import Program, ops, trace

from .common import needs_compiler

ALL_CASES = [(name, case) for name in references.NAMES for case in references.cases(name)]
#: Every optimizer, and of their representatives every case.
SOME_CASES = [(name, case) for name, case in ALL_CASES if case == "default" or references.representative(name)]


def sources(cases: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The C of optimizers in these cases, on many mixtures of types."""
    found: dict[str, str] = {}
    for name, case in cases:
        for rounding, dtype in (
            ("nearest", torch.float64),
            ("nearest", torch.float32),
            ("nearest", torch.float16),
            ("kahan", torch.bfloat16),
            ("stochastic", torch.bfloat16),
        ):
            params = [nn.Parameter(torch.ones(2, 2, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]
            options = {**references.cases(name)[case], "rounding": rounding}
            optimizer = OPTIMIZERS[name].create(params, engine="eager", **options)
            planner = optimizer._stepper.planner
            copies: dict[Tensor, Tensor] = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in params}
            for planned in planner.build(
                planner.members(params), params, copies if case == "default" else None, "max_grad_norm" in options
            ):
                source = CPrinter(planned.bucket.update.program, planned.bucket.layout).source()
                found.setdefault(source, f"{name}-{case}-{rounding}-{dtype}")
    return {label: source for source, label in found.items()}


@needs_compiler
def test_generated_code_has_no_warnings(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Many kernels in one file each, as the compiler's start is most of its time for one."""
    compiler = toolchains.find_toolchain().compiler
    cases = ALL_CASES if request.config.getoption("--matrix") else SOME_CASES
    paths = []
    for number, (label, source) in enumerate(sources(cases).items()):
        paths.append(tmp_path / f"{number}.c")
        paths[-1].write_text(f"/* {label} */\n{source}")
    assert len(paths) > 50
    flags = ["-std=gnu11", "-fopenmp", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run([compiler, *flags, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]


def test_generated_code_is_the_same_in_every_run() -> None:
    assert sources(SOME_CASES) == sources(SOME_CASES)


def printer(program: Program, dtype: torch.dtype = torch.float32) -> CPrinter:
    return CPrinter(program, Layout(dtype, tuple((name, dtype) for name in program.tensors)))


def test_every_operation_has_its_templates() -> None:
    reductions = {op.name for op in ops.OPS.values() if op.result == "reduction"}
    rounding = {"round_to", "stochastic_round"}  # elements only
    printed = set(ops.OPS) - {"total"}  # which ends a Program
    assert set(CPrinter.scalar_templates) == printed - rounding
    assert set(CPrinter.element_templates) == printed - reductions - {"noise_key"}
    assert set(CPrinter.accumulate_templates) == reductions


def test_values_have_a_kind() -> None:
    def rule(p: Any, g: Any, lr: Any, seed: Any) -> dict[str, Any]:
        keys = [ops.noise_key(seed, 0.0, 1.0, salt) for salt in range(2)]
        key = ops.where(lr > 0, *keys)
        mask = ops.where(lr > 0, g > 0, p > 0)
        return {"p": ops.stochastic_round(p * mask + ops.where(mask, p, g > 0), key) * ops.mean(mask)}

    program = trace(rule, tensors=("p", "g"), scalars=("lr", "seed"))
    c = printer(program)
    kinds = [(node.op, c.kind(node)) for node in program.nodes]
    assert sorted(kind for op, kind in kinds if op == "where") == ["bool", "key", "number"]
    assert {kind for op, kind in kinds if op == "gt"} == {"bool"}
    assert {kind for op, kind in kinds if op == "noise_key"} == {"key"}
    assert {kind for op, kind in kinds if op not in ("where", "gt", "noise_key")} == {"number"}
    # A key that was selected keeps its 32 bits.
    selected = next(i for i, node in enumerate(program.nodes) if c.kind(node) == "key" and node.op == "where")
    assert f"const uint32_t s{selected} = (uint32_t)w[{c.work_slots[selected]}];" in c.source()


def test_what_passes_accumulate_and_hand_on() -> None:
    def rule(p: Any, g: Any, lr: Any, step: Any) -> dict[str, Any]:
        half = lr * 0.5
        scaled = p / (ops.norm(p) + half)
        return {"p": scaled * ops.sum(scaled) * ops.mean(g) * half, "return": [ops.norm(g) * step]}

    program = trace(rule, tensors=("p", "g"), scalars=("lr", "step"))
    c = printer(program)
    first, second, last = program.passes
    squares, sums = c.accumulated(first), c.accumulated(second)
    nodes = program.nodes
    assert {nodes[i].op: text for i, text in squares if nodes[nodes[i].args[0]].attr("name") == "g"} == {
        "mean": f"(double){c.name(nodes[squares[-1][0]].args[0])}",
        "norm": "(double)v1 * (double)v1",
    }
    assert [(nodes[i].op, text) for i, text in sums] == [("sum", f"(double)v{nodes[sums[0][0]].args[0]}")]
    assert c.accumulated(last) == []
    assert c.reductions == len(squares) == 3
    assert [c.reduced_before(stage) for stage in range(3)] == [(), first.reductions, second.reductions]
    assert [nodes[i].op for i in c.earlier_scalars(first)] == []
    assert [nodes[i].op for i in c.earlier_scalars(second)] == ["scalar", "mul"]  # step; and half, for norm(p) + half
    assert c.table_scalars == ["lr"]
    assert list(c.work_slots.values()) == list(range(len(c.work_slots)))
