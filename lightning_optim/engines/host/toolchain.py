"""The C compiler, the OpenMP library and the processor of this machine."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from lightning_optim.engines.host.compiler import CompilerError, call

#: No contraction to FMA: the compiler contracts differently in a loop's body and after it, and in kernels with and
#: without the stores for an undo, so that steps with and without undo would differ in their last bits (gcc 12: the last
#: 3 of 35 weights). No part of `-ffast-math` that changes values is used: it would assume that there is no NaN, and
#: reorder what Kahan summation needs as written. errno and floating-point traps, which nobody reads, would keep square
#: roots and comparisons from being vectorized.
FLAGS = (
    "-std=gnu11", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
    "-w",
)  # fmt: skip


@dataclass(frozen=True)
class Toolchain:
    """What kernels are built with.

    Attributes:
        compiler: Path of the C compiler, or of a program that runs it (``ccache``).
        version: First line of ``compiler --version``.
        flags: All flags, the processor's included.
        libraries: What to link: torch's own OpenMP runtime, where its name differs from the system's.
        processor: What the code is tuned for; part of the cache key, since a home folder may be shared by
            machines with different processors.
        arguments: The arguments before the flags: all of ``$CC`` but its first word.
    """

    compiler: str
    version: str
    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    processor: str
    arguments: tuple[str, ...] = ()


#: A compiler tells its version in milliseconds; behind a network file system, in seconds.
ANSWER_SECONDS = 20.0


class ToolchainError(RuntimeError):
    """No usable compiler; the message says why."""


@lru_cache(maxsize=1)
def find_toolchain() -> Toolchain:
    """Look for a C compiler: ``$CC``, else ``cc``, ``gcc`` or ``clang`` in the PATH.

    As for make and CMake, ``$CC`` may have arguments (``ccache gcc``, ``gcc -m64``), in the quotes of a shell.

    Raises:
        ToolchainError: There is no compiler, or it does not answer.
    """
    candidates = _wanted(os.environ.get("CC", ""))
    found = next(((path, *rest) for name, *rest in candidates if (path := shutil.which(name))), None)
    if found is None:
        raise ToolchainError(f"no C compiler: {', '.join(words[0] for words in candidates)} not found in PATH")
    compiler, *arguments = found
    try:
        status, said = call([*found, "--version"], ANSWER_SECONDS)
    except CompilerError as error:
        raise ToolchainError(f"the C compiler {compiler} does not run: {error}") from error
    if status != 0:
        shown = f": {said.strip()[-300:]}" if said.strip() else ""
        raise ToolchainError(f"the C compiler {compiler} does not run: it ended with status {status}{shown}")
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    return Toolchain(
        compiler=compiler,
        version=said.partition("\n")[0],
        flags=(*FLAGS, native),
        libraries=torch_openmp(),
        processor=_processor(),
        arguments=tuple(arguments),
    )


def _wanted(variable: str) -> Sequence[Sequence[str]]:
    """Commands to try, from the value of ``$CC``."""
    if not variable.strip():
        return [["cc"], ["gcc"], ["clang"]]
    if shutil.which(variable):  # a path with blanks, not quoted
        return [[variable]]
    try:
        return [shlex.split(variable)]
    except ValueError as error:
        raise ToolchainError(f"no C compiler: CC={variable!r} is no command: {error}") from error


@lru_cache(maxsize=1)
def torch_openmp() -> tuple[str, ...]:
    """The OpenMP runtime that torch has loaded, if the linker would not find it by its usual name.

    Two OpenMP runtimes in one process are two pools of spinning threads on the same cores. A library that was
    linked with plain ``-fopenmp`` asks the loader for ``libgomp.so.1`` and gets torch's copy if that is its name;
    builds of torch whose copy is renamed (``libgomp-a34b3233.so.1``) must be linked by path.
    """
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    libraries += sorted(Path(torch.__file__).parent.parent.glob("torch.libs/libgomp*.so*"))
    return tuple(str(path) for path in libraries[:1] if path.name != "libgomp.so.1")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
