"""The Triton engine in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .common import needs_triton

TESTS = Path(__file__).parent / "interpreted"


@needs_triton
@pytest.mark.parametrize("part", sorted(path.stem for path in TESTS.glob("test_*.py")))
def test_interpreted(part: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(TESTS / f"{part}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
