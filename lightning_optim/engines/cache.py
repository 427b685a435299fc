"""The cache of generated code: a private folder, whose files are checked before they are loaded.

A file's name is ``<key>-<digest><suffix>``: the key is a hash of all that the file is made from, the digest a hash of
its own bytes, so that a truncated or altered file is never loaded, and one atomic rename publishes both. Whoever can
write to the folder can forge such a name, so only this user may (:mod:`lightning_optim.engines.private`).
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from lightning_optim.engines.errors import EngineError
from lightning_optim.engines.private import has_room, made_private, not_private, opened, read_own

CACHE_VARIABLE = "LIGHTNING_OPTIM_CACHE"
#: How long to wait for another process that makes the same file before making it too.
LOCK_SECONDS = 30.0

Loaded = TypeVar("Loaded")


class BuildError(EngineError):
    """A kernel could not be built or loaded; the message holds the compiler's."""


@dataclass(frozen=True)
class Kept:
    """A file of the cache that has been checked.

    Attributes:
        path: Its path.
        opened_path: Its path through the open folder's descriptor, for opening it once more: links on the way to the
            folder no longer matter. The file's name has the digest of its content, so different files never share one.
        content: Its bytes.
    """

    path: Path
    opened_path: Path
    content: bytes


def cache_folder() -> Path:
    """Where kernels are kept: ``$LIGHTNING_OPTIM_CACHE``, else ``lightning_optim`` in the user's cache folder.

    A relative path starts at the folder in which the process was when it first needed a kernel.

    Raises:
        OSError: The user has no home folder, or the current folder is gone.
    """
    if own := os.environ.get(CACHE_VARIABLE):
        return _absolute(own)
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The standard says that relative paths are to be ignored there.
    return (Path(base) if os.path.isabs(base) else _absolute("~/.cache")) / "lightning_optim"


@lru_cache(maxsize=16)
def _remembered(folder: Path) -> Path:
    return folder.absolute()


def _absolute(text: str) -> Path:
    if not text.startswith("~"):
        return _remembered(Path(text))
    expanded = Path(os.path.expanduser(text))
    if not expanded.is_absolute():
        raise FileNotFoundError(f"{text}: this user has no home folder")
    return expanded


@lru_cache(maxsize=8)
def private_folder(folder: Path | None) -> Path:
    """``folder`` if this user alone can write to it, else a temporary one for this process.

    Raises:
        OSError: There is no place for a temporary folder either.
    """
    return _temporary() if folder is None or made_private(folder) is not None else folder


def _temporary() -> Path:
    """A new folder that is removed when this process ends, in a place where nobody else can replace it.

    Raises:
        OSError: There is no such place.
    """
    bases = [Path(base) for base in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp"))]  # noqa: S108
    for base in bases:
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="lightning_optim-", dir=base))
            if os.getuid() == os.geteuid() and not_private(folder) is not None:
                folder.rmdir()
                continue
            atexit.register(_remove, folder, os.getpid())
            return folder
    raise OSError(f"others can write to {', '.join(map(str, bases))}, or this user cannot")


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child's end is not the end of its parent
        shutil.rmtree(folder, ignore_errors=True)


def _wanted() -> Path | None:
    with contextlib.suppress(OSError):
        return cache_folder()
    return None


def _usable(wanted: Path | None) -> Path:
    """The folder to use now; a folder that was deleted (by a cleaner, say) is made again."""
    folder = private_folder(wanted)
    if made_private(folder) is not None:  # no longer private, though it was
        private_folder.cache_clear()
        folder = private_folder(wanted)
    return folder


def cached(key: str, suffix: str, make: Callable[[Path], Path], load: Callable[[Kept], Loaded]) -> Loaded:
    """The result of ``load`` on the file of ``key``: from the cache if it is there and intact, else made now.

    Args:
        key: A hash, in letters and digits, of all that the file depends on.
        suffix: The suffix of the file's name.
        make: Given an empty folder of its own, makes the file there and returns its path.
        load: Loads the file, which it must not trust to be what ``make`` makes. If it raises :class:`BuildError` for
            a cached file, the file is made anew.

    Raises:
        BuildError: There is no folder to keep it in, or ``make`` or ``load`` failed.
    """
    try:
        folder = _usable(_wanted())
    except OSError as error:
        raise BuildError(f"there is no folder to keep kernels in: {error}") from error
    try:
        return _cached_in(folder, key, suffix, make, load)
    except (BuildError, OSError) as error:
        if not has_room(folder):
            with contextlib.suppress(OSError):
                return _cached_in(_usable(None), key, suffix, make, load)
        raise error if isinstance(error, BuildError) else BuildError(f"building a kernel failed: {error}") from error


def _cached_in(
    folder: Path, key: str, suffix: str, make: Callable[[Path], Path], load: Callable[[Kept], Loaded]
) -> Loaded:
    with opened(folder) as descriptor:
        there = _Files(folder, descriptor)
        for loaded in there.load_intact(key, suffix, load):
            return loaded
        with there.lock(f"{key}.lock"):
            for loaded in there.load_intact(key, suffix, load):
                return loaded
            kept = there.publish(key, suffix, make)
            try:
                return load(kept)
            except BuildError:
                there.remove(kept.path.name)  # intact but of no use: the next process must make it again
                raise


@dataclass(frozen=True)
class _Files:
    """The files of an open folder."""

    folder: Path
    descriptor: int

    def load_intact(self, key: str, suffix: str, load: Callable[[Kept], Loaded]) -> Iterator[Loaded]:
        """Load the intact files of a key, one after the other; files that are damaged or fail to load are removed."""
        for name in sorted(os.listdir(self.descriptor)):
            if not (name.startswith(f"{key}-") and name.endswith(suffix)):
                continue
            try:
                content = read_own(name, self.descriptor)
                if content is not None and name == _name(key, content, suffix):
                    yield load(self._kept(name, content))
                    continue
            except (OSError, BuildError):
                pass
            self.remove(name)

    def publish(self, key: str, suffix: str, make: Callable[[Path], Path]) -> Kept:
        """Make the file of a key, and give it its name."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="build-") as scratch:
            made = make(Path(scratch))
            made.chmod(0o600)  # whatever this user's umask lets a group do
            content = made.read_bytes()
            name = _name(key, content, suffix)
            os.replace(made, name, dst_dir_fd=self.descriptor)
        return self._kept(name, content)

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self.descriptor)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Let one process build while the others wait; on file systems without locks all build, which is as correct."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                file = os.open(name, flags, 0o600, dir_fd=self.descriptor)
                stack.callback(os.close, file)
                deadline = time.monotonic() + LOCK_SECONDS
                while time.monotonic() < deadline:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        time.sleep(0.02)
            yield

    def _kept(self, name: str, content: bytes) -> Kept:
        by_descriptor = Path(f"/proc/self/fd/{self.descriptor}") / name
        return Kept(self.folder / name, by_descriptor if by_descriptor.exists() else self.folder / name, content)


def _name(key: str, content: bytes, suffix: str) -> str:
    return f"{key}-{hashlib.sha256(content).hexdigest()}{suffix}"
