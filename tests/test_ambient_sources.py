"""No tensor of the package is made on torch's default device, or of its default type: a program may have set both."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning_optim

#: Functions of torch that make a tensor from no other tensor, and so where and as what the program's defaults say.
FACTORIES = frozenset(
    {
        "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones",
        "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros",
    }
)  # fmt: skip
#: Those whose type follows from their arguments (integers, a generator's permutation).
OF_INTEGERS = frozenset({"arange", "randint", "randperm"})


def careless(source: str) -> list[str]:
    """Calls that leave something to torch's defaults: the line, and what is missing."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (
            isinstance(node.func.value, ast.Name) and node.func.value.id == "torch" and node.func.attr in FACTORIES
        ):
            continue
        given = {keyword.arg for keyword in node.keywords}
        if None in given:  # **options
            continue
        needed = {"device"} if node.func.attr in OF_INTEGERS else {"device", "dtype"}
        found += [f"line {node.lineno}: torch.{node.func.attr} without {name}" for name in sorted(needed - given)]
    return found


def test_what_is_careless_is_found() -> None:
    source = "a = torch.zeros(2)\nb = torch.arange(3, device='cpu')\nc = torch.full((), 1.0, dtype=d, device=e)\n"
    assert careless(source) == ["line 1: torch.zeros without device", "line 1: torch.zeros without dtype"]


def test_every_tensor_of_the_package_has_its_device_and_type_said() -> None:
    root = Path(lightning_optim.__file__).parent
    paths = sorted(root.rglob("*.py"))
    assert len(paths) > 50
    found = [f"{path.relative_to(root)}, {what}" for path in paths for what in careless(path.read_text("utf-8"))]
    assert found == []
