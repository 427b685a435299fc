"""Benchmarks run from end to end at sizes that say nothing about speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_optim.engines import ENGINES

ROOT = Path(__file__).parent.parent
# At this size every tensor of the scaled GPT-2 is a multiple of 16 weights, as at full size.
SIZE = "54.1k"

NO_COMPILER = ENGINES["host"].unavailable()
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))


def _run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        # One thread: many tests may run at once, and threads of such small kernels would mostly wait for each other.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
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


def test_sizes_that_are_none_are_refused() -> None:
    for argument in ("10", "0M"):
        done = _run("offload.py", "--sizes", argument)
        assert done.returncode == 2
        assert "valid: a number with k or M, such as 10M" in done.stderr
