"""The optimizer that CONTRIBUTING.md adds, in three files, goes through the matrix that the others go through."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL | re.MULTILINE)

#: What is run of it by default: that it is complete, steps as its reference, and is there for who configures.
SMOKE = [
    "tests/trajectories/test_registry.py",
    "tests/trajectories/test_references.py",
    "tests/optimizers/test_registry.py",
    "tests/optimizers/test_state_dict.py",
    "tests/conformance/test_command_lines.py",
]


def block(text: str) -> str:
    (found,) = (block for block in BLOCKS if text in block)
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository, and the three blocks where CONTRIBUTING.md says."""
    folder = tmp_path_factory.mktemp("contributed") / "copy"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "shared")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
    (folder / "lightning_optim" / "optimizers" / "signum.py").write_text(block("class Signum(RuleOptimizer)"))
    (folder / "tests" / "references" / "signum.py").write_text(block("from .shared import"))
    exports = folder / "lightning_optim" / "optimizers" / "__init__.py"
    line = block("import Signum as Signum")
    exports.write_text(exports.read_text().replace("\nfrom lightning_optim", f"\n{line}from lightning_optim", 1))
    return folder


def run(folder: Path, *arguments: str, **environment: str) -> None:
    flags = ["-q", "-x", "-k", "signum", "-p", "no:xdist"]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "LIGHTNING_OPTIM_ENGINE"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, *arguments],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_three_files_are_all_it_takes(copy: Path) -> None:
    run(copy, *SMOKE)


@pytest.mark.matrix
def test_it_passes_the_whole_matrix(copy: Path) -> None:
    run(copy, "--matrix", "tests")


@pytest.mark.matrix
def test_it_passes_in_tritons_interpreter(copy: Path) -> None:
    pytest.importorskip("triton")
    run(copy, "--matrix", "tests/triton_engine/interpreted", TRITON_INTERPRET="1")
