"""From a Program to Triton kernels that can be launched."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_optim.engines.base import Layout
from lightning_optim.engines.cache import BuildError, cached
from lightning_optim.engines.triton.printer import TritonPrinter
from lightning_optim.rules.trace import Program


@dataclass(frozen=True)
class Kernels:
    """The kernels of a Program.

    Attributes:
        scalars: Before each pass over memory, what evaluates its scalars.
        sweeps: The passes.
        table_scalars: The columns of the table.
        width: Scalars that ``work`` keeps of each tensor.
        reductions: Sums that ``partials`` keeps of each chunk.
    """

    scalars: tuple[Any, ...]
    sweeps: tuple[Any, ...]
    table_scalars: tuple[str, ...]
    width: int
    reductions: int


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why there is no Triton here, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        found = importlib.util.find_spec("triton") is not None
        return f"Triton does not import: {error}" if found else "Triton is not installed"
    return None


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on tensors of the CPU (``TRITON_INTERPRET=1``)."""
    if missing() is not None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def build(program: Program, layout: Layout) -> Kernels:
    """The kernels of a Program; Triton itself compiles them at their first launch.

    Raises:
        BuildError: Their module could not be kept, or does not load.
    """
    printer = TritonPrinter(program, layout, interpreted=interpreted())
    module = load(printer.source())
    stages = range(len(program.passes))
    return Kernels(
        scalars=tuple(getattr(module, f"scalars_{stage}") for stage in stages),
        sweeps=tuple(getattr(module, f"sweep_{stage}") for stage in stages),
        table_scalars=tuple(printer.table_columns),
        width=printer.width,
        reductions=max(printer.reductions, 1),
    )


def load(source: str) -> ModuleType:
    """A module of generated code, which Triton wants to find in a file.

    Raises:
        BuildError: It could not be kept, or does not load.
    """
    key = hashlib.sha256(source.encode()).hexdigest()[:32]

    def write(scratch: Path) -> Path:
        path = scratch / "kernels.py"
        path.write_text(source)
        return path

    path = cached(key, ".py", write)
    spec = importlib.util.spec_from_file_location(f"lightning_optim_triton_{key}", path)
    if spec is None or spec.loader is None:
        raise BuildError(f"the generated kernels at {path} do not load")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BuildError(f"the generated kernels do not load: {type(error).__name__}: {error}") from error
    return module
