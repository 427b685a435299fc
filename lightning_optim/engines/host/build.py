"""Compiled kernels: built once per machine and kept in the cache."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from pathlib import Path

from lightning_optim.engines.cache import BuildError, Kept, cached
from lightning_optim.engines.host.compiler import CompilerError, call
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
    # The library itself contains its key, not only its file's name.
    signed = f'{source}\nconst char lo_key[] = "{key}";\n'
    return cached(key, ".so", lambda scratch: _compile(signed, toolchain, scratch), _opener(key, kind))


def _opener(key: str, kind: type[ctypes.CDLL]) -> Callable[[Kept], ctypes.CDLL]:
    def open_library(kept: Kept) -> ctypes.CDLL:
        try:
            library = kind(str(kept.opened_path))
            found = (ctypes.c_char * (len(key) + 1)).in_dll(library, "lo_key").value
        except (OSError, ValueError) as error:
            raise BuildError(f"the compiled kernel does not load: {error}") from error
        if found != key.encode():
            raise BuildError(f"the compiled kernel {kept.path} is not the one that its name says")
        return library

    return open_library


def _compile(source: str, toolchain: Toolchain, scratch: Path) -> Path:
    code, library = scratch / "kernel.c", scratch / "kernel.so"
    code.write_text(source, encoding="utf-8")
    command = [toolchain.compiler, *toolchain.arguments, *toolchain.flags, str(code), "-o", str(library)]
    try:
        # The compiler runs in the private folder, and its own temporary files go there too.
        status, said = call([*command, *toolchain.libraries, "-lm"], BUILD_SECONDS, scratch, TMPDIR=str(scratch))
    except CompilerError as error:
        raise BuildError(f"building a kernel failed: {error}") from error
    if status != 0:
        raise BuildError(f"{toolchain.compiler} failed: {said.strip()[-500:]}")
    return library
