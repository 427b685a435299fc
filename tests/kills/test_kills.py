"""A run that is killed and resumed ends with the bits of the run that nobody killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _kills(*arguments: str) -> None:
    """In a process of its own: one that has computed with many threads should not be forked."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_three_killed_runs() -> None:
    _kills("--kills", "3", "--only", "detached, speculative", "detached, stochastic", "optim_auto, accumulation")


@pytest.mark.slow
def test_thirty_killed_runs() -> None:
    _kills("--kills", "30", "--seed", str(os.getpid()))
