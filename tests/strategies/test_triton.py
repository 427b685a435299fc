"""From the Trainer down to Triton's kernels, which its interpreter runs on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    triton = pytest.importorskip("triton")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version <= (3, 6) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"the loops of Triton {triton.__version__}'s interpreter fail with NumPy {np.__version__}")
    package = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", f"{package.name}.interpreted"],
        cwd=package.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "LIGHTNING_OPTIM_ENGINE": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", ["plain", "clip and accumulate", "16-mixed"])
@pytest.mark.parametrize("name", ["ours", "adopted"])
def test_equals_lightnings_own_strategy(name: str, case: str, results: dict[str, Any]) -> None:
    """Of torch's AdamW: within a millionth, after updates of up to 0.05 each."""
    result = results[f"{name}: {case}"]
    assert "triton (requested)" in result["report"]
    assert "not triton" not in result["report"]
    assert result["difference"] <= 1e-6
    assert result["moved"] > 0.01
    assert result["scalers"][0] == result["scalers"][1]
    if case == "16-mixed":
        assert len(set(result["lrs"])) == len(result["lrs"]) - 1  # one step was left out
