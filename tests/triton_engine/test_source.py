"""Nothing in the engine's own source reads a device tensor from the host."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lightning_optim

FOLDER = Path(lightning_optim.__file__).parent / "engines" / "triton"
WAITING = {"item", "cpu", "tolist", "numpy", "nonzero", "synchronize", "is_nonzero", "equal", "allclose"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_no_call_that_waits(path: Path) -> None:
    calls = [
        f"{node.func.attr}() in line {node.lineno}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITING
    ]
    assert not calls
