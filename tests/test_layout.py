"""The layout: imports point downward and never in a circle, files are short, `optimizers/` holds optimizers."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

import lightning_optim
from lightning_optim import optimizers

PACKAGE = Path(lightning_optim.__file__).parent
ROOT = PACKAGE.parent
NAME = PACKAGE.name
MOST_LINES = 400

#: From the bottom to the top: what stands in a line may import what stands in the lines above it, and itself.
LAYERS = (
    ("_commands", "_version", "after_import", "hints", "known_as", "primitives", "warnings"),
    ("checks", "strategy_names"),
    ("param_groups",),
    ("rules",),
    ("engines",),
    ("stepping",),
    ("optimizers", "schedulers"),
    ("registry",),
    ("adopt",),
    ("placement",),
    ("control", "offload"),
    ("callbacks",),
    ("strategies",),
    ("cli",),
    ("__main__",),
)


@cache
def modules() -> dict[str, Path]:
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def _for_type_checkers(tree: ast.AST) -> set[ast.AST]:
    guards = (node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    return {inner for guard in guards for statement in guard.body for inner in ast.walk(statement)}


def _imported(file: Path) -> Iterator[str]:
    """Modules of the package that a file imports, those included that a function imports when it runs."""
    tree = ast.parse(file.read_text())
    unseen = _for_type_checkers(tree)
    for node in ast.walk(tree):
        match node:
            case _ if node in unseen:
                continue
            case ast.Import(names):
                yield from (alias.name for alias in names if alias.name in modules())
            case ast.ImportFrom(str(module), names, 0) if module in modules():
                inner = (f"{module}.{alias.name}" for alias in names)
                yield from (name if name in modules() else module for name in inner)


@cache
def imports() -> dict[str, set[str]]:
    return {name: set(_imported(file)) - {name} for name, file in modules().items()}


def test_imports_make_no_circle() -> None:
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_imports_point_downward() -> None:
    level = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    wrong = []
    for name, others in imports().items():
        if name == NAME:
            continue  # the package itself offers what is anywhere in it
        own = name.split(".")[1]
        for other in others:
            part = other.removeprefix(NAME).removeprefix(".").partition(".")[0]
            # Only the command line takes the package as its users do.
            allowed = own == "cli" if not part else part == own or level[part] < level[own]
            if not allowed:
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_every_part_has_a_layer() -> None:
    parts = {name.split(".")[1] for name in modules() if name != NAME}
    assert parts == {part for layer in LAYERS for part in layer}


def test_no_file_is_long() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    lengths = {file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines()) for file in files}
    assert {file: length for file, length in lengths.items() if length > MOST_LINES} == {}


def test_optimizers_holds_optimizers() -> None:
    folder = PACKAGE / "optimizers"
    assert {entry.name for entry in folder.iterdir() if entry.is_dir()} - {"__pycache__"} == {"lbfgs"}
    homes = {inspect.getmodule(cls) for cls in optimizers.EXPORTED.values() if issubclass(cls, torch.optim.Optimizer)}
    files = {Path(inspect.getfile(home)) for home in homes if home is not None}
    assert files >= {file for file in folder.glob("*.py") if file.stem != "__init__"}
