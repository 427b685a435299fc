"""Compiled kernels: built once per machine and kept in the cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

from lightning_optim.engines.cache import BuildError, cached
from lightning_optim.engines.host.toolchain import Toolchain

#: A kernel compiles in well under a second; a compiler that takes this long hangs.
BUILD_SECONDS = 120.0


def load(source: str, toolchain: Toolchain, kind: type[ctypes.CDLL] = ctypes.CDLL) -> ctypes.CDLL:
    """The library built from ``source``: from the cache if it is there and intact, else compiled now.

    Args:
        source: C code.
        toolchain: What to compile it with.
        kind: ``ctypes.CDLL``, whose functions run without the GIL, or ``ctypes.PyDLL``, whose functions hold it.

    Raises:
        BuildError: The compiler failed, or its library does not load.
    """
    key = hashlib.sha256("\0".join([source, str(toolchain)]).encode()).hexdigest()[:32]
    path = cached(key, ".so", lambda scratch: _compile(source, toolchain, scratch))
    try:
        return kind(str(path))
    except OSError as error:
        path.unlink(missing_ok=True)  # whole as it is, it is of no use: the next process must compile again
        raise BuildError(f"the compiled kernel does not load: {error}") from error


def _compile(source: str, toolchain: Toolchain, scratch: Path) -> Path:
    code, library = scratch / "kernel.c", scratch / "kernel.so"
    code.write_text(source)
    command = [toolchain.compiler, *toolchain.flags, str(code), "-o", str(library), *toolchain.libraries, "-lm"]
    try:
        # The compiler's own temporary files go to the private folder too.
        result = subprocess.run(  # noqa: S603 - the compiler that the user's own PATH or $CC names
            command,
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            cwd=scratch,  # relative names keep its messages free of a path that is another one every time
            env={**os.environ, "TMPDIR": str(scratch)},
            check=False,
        )
    except subprocess.SubprocessError as error:
        raise BuildError(f"building a kernel failed: {error}") from error
    if result.returncode != 0:
        raise BuildError(f"{toolchain.compiler} failed: {result.stderr.strip()[-500:]}")
    return library
