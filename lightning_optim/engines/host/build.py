"""Compiled kernels: built once per machine, kept in a private folder, checked before they are loaded.

A library's file name is ``<key>-<digest>.so``: the key is a hash of all that the build depends on, the digest one
of the file's own bytes, so that a truncated or altered file is never loaded, and one atomic rename publishes both.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from lightning_optim.engines.base import EngineError
from lightning_optim.engines.host.toolchain import Toolchain

CACHE_VARIABLE = "LIGHTNING_OPTIM_CACHE"
#: A kernel compiles in well under a second; a compiler that takes this long hangs.
BUILD_SECONDS = 120.0
#: How long to wait for another process that builds the same kernel before building it too.
LOCK_SECONDS = 30.0


class BuildError(EngineError):
    """A kernel could not be built or loaded; the message holds the compiler's."""


def cache_folder() -> Path:
    """Where kernels are kept: ``$LIGHTNING_OPTIM_CACHE``, else ``lightning_optim`` in the user's cache folder."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "lightning_optim"


@lru_cache(maxsize=8)
def private_folder(folder: Path) -> Path:
    """``folder`` if this user alone can write to it, else a temporary one for this process."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        info = folder.stat()
        private = info.st_uid == os.getuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if private and os.access(folder, os.W_OK):
            return folder
    # Others could put code there that this process would load, or nothing can be kept there at all.
    temporary = tempfile.mkdtemp(prefix="lightning_optim-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


def load(source: str, toolchain: Toolchain, kind: type[ctypes.CDLL] = ctypes.CDLL) -> ctypes.CDLL:
    """The library built from ``source``: from the cache if it is there and intact, else compiled now.

    Args:
        source: C code.
        toolchain: What to compile it with.
        kind: ``ctypes.CDLL``, whose functions run without the GIL, or ``ctypes.PyDLL``, whose functions hold it.

    Raises:
        BuildError: The compiler failed, or its library does not load.
    """
    try:
        folder = private_folder(cache_folder())
    except OSError as error:
        raise BuildError(f"there is no folder to keep kernels in: {error}") from error
    key = hashlib.sha256("\0".join([source, str(toolchain)]).encode()).hexdigest()[:32]
    path = _cached(folder, key)
    if path is None:
        with _lock(folder / f"{key}.lock"):
            path = _cached(folder, key) or _compile(source, toolchain, folder, key)
    try:
        return kind(str(path))
    except OSError as error:
        path.unlink(missing_ok=True)  # whole as it is, it is of no use: the next process must compile again
        raise BuildError(f"the compiled kernel does not load: {error}") from error


def _cached(folder: Path, key: str) -> Path | None:
    for path in folder.glob(f"{key}-*.so"):
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() == path.stem.partition("-")[2]:
                return path
            path.unlink()
        except OSError:
            continue
    return None


def _compile(source: str, toolchain: Toolchain, folder: Path, key: str) -> Path:
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
            code, library = Path(scratch, "kernel.c"), Path(scratch, "kernel.so")
            code.write_text(source)
            command = [
                toolchain.compiler,
                *toolchain.flags,
                str(code),
                "-o",
                str(library),
                *toolchain.libraries,
                "-lm",
            ]
            # The compiler's own temporary files go to the private folder too.
            result = subprocess.run(  # noqa: S603 - the compiler that the user's own PATH or $CC names
                command,
                capture_output=True,
                text=True,
                timeout=BUILD_SECONDS,
                cwd=scratch,  # relative names keep its messages free of a path that is another one every time
                env={**os.environ, "TMPDIR": scratch},
                check=False,
            )
            if result.returncode != 0:
                raise BuildError(f"{toolchain.compiler} failed: {result.stderr.strip()[-500:]}")
            digest = hashlib.sha256(library.read_bytes()).hexdigest()
            path = folder / f"{key}-{digest}.so"
            os.replace(library, path)
            return path
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"building a kernel failed: {error}") from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process build while the others wait; on file systems without locks all build, which is as correct."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context(path.open("w"))
            deadline = time.monotonic() + LOCK_SECONDS
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.02)
        yield
