"""Where generated code is kept: a private folder, in which files are checked before they are loaded.

A file's name is ``<key>-<digest><suffix>``: the key is a hash of all that its making depends on, the digest one of
its own bytes, so that a truncated or altered file is never loaded, and one atomic rename publishes both.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from lightning_optim.engines.base import EngineError

CACHE_VARIABLE = "LIGHTNING_OPTIM_CACHE"
#: How long to wait for another process that makes the same file before making it too.
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


def cached(key: str, suffix: str, make: Callable[[Path], Path]) -> Path:
    """The file that belongs to ``key``: from the cache if it is there and intact, else made now.

    Args:
        key: Of letters and digits: a hash of all that the file depends on.
        suffix: Of its name.
        make: Given an empty folder of its own, makes the file there and returns its path.

    Raises:
        BuildError: There is no folder to keep it in, or ``make`` failed.
    """
    try:
        folder = private_folder(cache_folder())
    except OSError as error:
        raise BuildError(f"there is no folder to keep kernels in: {error}") from error
    path = _intact(folder, key, suffix)
    if path is not None:
        return path
    with _lock(folder / f"{key}.lock"):
        return _intact(folder, key, suffix) or _publish(folder, key, suffix, make)


def _intact(folder: Path, key: str, suffix: str) -> Path | None:
    for path in folder.glob(f"{key}-*{suffix}"):
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() == path.stem.partition("-")[2]:
                return path
            path.unlink()
        except OSError:
            continue
    return None


def _publish(folder: Path, key: str, suffix: str, make: Callable[[Path], Path]) -> Path:
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
            made = make(Path(scratch))
            path = folder / f"{key}-{hashlib.sha256(made.read_bytes()).hexdigest()}{suffix}"
            os.replace(made, path)
            return path
    except OSError as error:
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
