"""Mutations of weights, gradients, state and groups between steps: right or a clear error, and never a crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .common import seeds


def test_mutations_of_memory() -> None:
    """In a process of its own, whose end says which case it was."""
    cases = seeds(80)
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.memory_cases", str(cases.start), str(len(cases))],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.splitlines()[-1] if done.stdout else "none"
    assert done.returncode == 0, f"ended with {done.returncode} in case {last}\n{done.stderr[-4000:]}"
    assert len(done.stdout.splitlines()) == len(cases)
