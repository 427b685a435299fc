"""Benchmarks run from end to end at sizes that say nothing about speed."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_optim.engines import ENGINES
from lightning_optim.registry import OPTIMIZERS

ROOT = Path(__file__).parent.parent
# At this size every tensor of the scaled GPT-2 is a multiple of 16 weights, as at full size.
SIZE = "54.1k"

NO_COMPILER = ENGINES["host"].unavailable()
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))


def _run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        # One thread: many tests may run at once, and threads of such small kernels would mostly wait for each other.
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def offload(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("results")
    tiny = ["--sizes", SIZE, "--seconds", "0", "--rounds", "1", "--steps", "1"]
    link = ["--link-weights", SIZE, "--backward", "0.01", "--forward", "0.01", "--models", "gpt2"]
    done = _run("offload.py", "--parts", "host", "copied", "gpu", "--rehearse", *tiny, *link, "--output", str(folder))
    assert done.returncode == 0, done.stderr
    assert (folder / "offload.md").read_text() in done.stdout
    return json.loads((folder / "offload.json").read_text()), done.stdout


@needs_compiler
def test_the_offload_benchmark_measures_every_way(offload: tuple[dict[str, Any], str]) -> None:
    result, _ = offload
    assert {case["group"] for case in result["host"]["cases"]} == {"peers", "rules", "undo"}
    for case in result["host"]["cases"]:
        assert all(row["ns_per_weight"] > 0 and row["rounds"] >= 5 for row in case["rows"])
    link = result["copied"]
    assert {case["model"] for case in link["cases"]} == {"gpt2"}
    for case in link["cases"]:
        assert len(case["rows"]) == 13
        assert all(row["exposed_ms"] > 0 for row in case["rows"])
        same = link["bit_equal_under_jitter"][case["model"]]
        assert len(same) == 11
        assert all(same.values())


@needs_compiler
def test_the_rehearsal_for_a_gpu_writes_no_figures(offload: tuple[dict[str, Any], str]) -> None:
    result, printed = offload
    assert "gpu" not in result
    assert "these are no figures" in printed
    _, _, after = printed.partition("nothing is written\n")
    found, _ = json.JSONDecoder().raw_decode(after)
    assert found["figures"] is False
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["detached, clip=exact"]["largest_weights"] > rows["in-graph"]["largest_weights"] > 0


Run = Callable[..., str]


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None) -> Iterator[Run]:
    """Runs a benchmark in this process, where torch is imported already; what it prints."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
        return capsys.readouterr().out

    yield run
    for name in set(sys.modules) - before:  # "common" may be anybody's
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == ROOT / "benchmarks":
            del sys.modules[name]


@needs_compiler
def test_the_host_benchmark(run_here: Run, tmp_path: Path) -> None:
    tiny = ["--sizes", SIZE, "--rounds", "1", "--seconds", "0", "--output", str(tmp_path)]
    printed = run_here("host_step.py", *tiny, "--rules", "muon")  # the one whose parameters need names
    result = json.loads((tmp_path / "host_step.json").read_text())
    assert (tmp_path / "host_step.md").read_text() in printed
    assert [case["tensors"] for case in result["cases"]] == [148, 1]
    assert all(row["ns_per_weight"] > 0 for case in result["cases"] for row in case["rows"])
    assert list(result["build_seconds"]) == ["muon"]


def test_the_host_benchmark_builds_rules_alone(run_here: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_here("host_step.py", "--rules", "lbfgs")
    assert exit_info.value.code == 2
    assert ", ".join(OPTIMIZERS) in capsys.readouterr().err.replace("'", "")


@needs_compiler
def test_two_checkouts_take_turns(run_here: Run) -> None:
    tiny = ["--sizes", "1k", "--rounds", "1", "--seconds", "0", "--starts", "1"]
    rows = [line.split(" | ") for line in run_here("host_step.py", "--against", str(ROOT), *tiny).splitlines()]
    found = {(row[1], row[2]): float(row[5]) for row in rows if row[0] == "| 1k"}
    assert set(found) == {
        ("adamw", "lightning-optim host"),
        ("adamw", "torch fused"),
        ("lion", "lightning-optim host"),
        ("adamw mixed", "lightning-optim host"),
    }
    assert all(ratio > 0 for ratio in found.values())


@needs_compiler  # whose version it tells
def test_the_benchmark_of_l_bfgs(run_here: Run, tmp_path: Path) -> None:
    tiny = ["--weights", "100", "--history", "3", "--rounds", "1", "--output", str(tmp_path)]
    printed = run_here("lbfgs_step.py", *tiny)
    assert (tmp_path / "lbfgs_step.md").read_text() in printed
    rows = json.loads((tmp_path / "lbfgs_step.json").read_text())["rows"]
    assert len(rows) == 6
    assert all(row["milliseconds_per_iteration"] > 0 for row in rows)


@needs_triton
def test_the_benchmark_for_a_gpu_in_the_interpreter() -> None:
    _interpret("host")


@needs_triton
@pytest.mark.slow
def test_all_cases_of_the_benchmark_for_a_gpu_in_the_interpreter() -> None:
    _interpret()


def _interpret(*cases: str) -> None:
    """In a process of its own: Triton asks for its interpreter when it is imported."""
    chosen = ["--cases", *cases] if cases else []
    done = _run("gpu_step.py", "--weights", "200", "--rounds", "1", *chosen, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == (len(cases) or 11)
    assert all(row["device_ms"] > 0 for case in rows for row in case["rows"])


def test_sizes_that_are_none_are_refused(run_here: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for script, argument in (("offload.py", "10"), ("offload.py", "0M"), ("host_step.py", "1G")):
        with pytest.raises(SystemExit) as exit_info:
            run_here(script, "--sizes", argument)
        assert exit_info.value.code == 2
        assert "valid: a number with k or M, such as 10M" in capsys.readouterr().err
