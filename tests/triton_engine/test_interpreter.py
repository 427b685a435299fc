"""The Triton engine in Triton's interpreter, which Triton asks for when it is imported: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .common import needs_triton

pytestmark = pytest.mark.long


@needs_triton
def test_interpreted(request: pytest.FixtureRequest) -> None:
    options = ["--matrix"] if request.config.getoption("--matrix") else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", *options, str(Path(__file__).parent / "interpreted")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
