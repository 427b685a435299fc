"""Folders in which only this user, and root, can put anything: what is loaded from there is this user's own."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

#: The system's own limit on symbolic links in a path.
MOST_LINKS = 40
#: How many bytes are written after a failed build, to tell a full disk from a broken compiler.
PROBE_BYTES = 1 << 20

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def made_private(folder: Path) -> str | None:
    """Make ``folder`` if it is missing; returns why it is not private or not writable, or None if it is both."""
    try:
        for missing in reversed([part for part in (folder, *folder.parents) if not part.exists()]):
            with contextlib.suppress(FileExistsError):
                missing.mkdir(mode=0o700)
    except OSError as error:
        return f"it cannot be made: {error}"
    return not_private(folder) or (None if os.access(folder, os.W_OK) else "it is not writable")


def not_private(folder: Path) -> str | None:
    """Why somebody else could change what is found in ``folder``, an absolute path, or None if nobody could.

    Every folder and every symbolic link on the way must be this user's or root's, so that nobody else can replace it;
    others may write to a folder only if it is sticky, like ``/tmp``, where they cannot touch the files of others. The
    folder itself must be this user's alone. Only its owner and root can change any of this later, so what is private
    now stays private.
    """
    try:
        info = os.lstat("/")
        here, shared, links = "/", _shared(info), 0
        steps = list(reversed(folder.parts[1:]))
        while steps:
            step = steps.pop()
            if step == "..":  # no part of `here` is a link
                here = os.path.dirname(here)
                info = os.lstat(here)
                shared = _shared(info)
                continue
            place = os.path.join(here, step)
            info = os.lstat(place)
            if info.st_uid != os.getuid() and (info.st_uid not in _system_users() or (shared and info.st_uid != 0)):
                return f"{place} belongs to user {info.st_uid}"
            if stat.S_ISLNK(info.st_mode):
                links += 1
                if links > MOST_LINKS:
                    return f"{place} is one of too many symbolic links"
                target = Path(os.readlink(place))
                steps.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
                if target.is_absolute():
                    here, shared = "/", _shared(os.lstat("/"))
                continue
            if not stat.S_ISDIR(info.st_mode):
                return f"{place} is not a folder"
            here, shared = place, _shared(info)
            if shared and not info.st_mode & stat.S_ISVTX:
                return f"others can write to {place}"
    except OSError as error:
        return str(error)
    if not info.st_uid == os.getuid() == os.geteuid():
        return f"{here} belongs to user {info.st_uid}, this process runs as {os.getuid()} and {os.geteuid()}"
    return f"others can write to {here}" if shared else None


def _shared(info: os.stat_result) -> bool:
    return bool(info.st_mode & _OTHERS_WRITE)


@lru_cache(maxsize=1)
def _system_users() -> frozenset[int]:
    """Root; and in a user namespace without root, the number that stands for all users that it does not map."""
    try:
        ranges = [list(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
        if any(first == 0 for first, _, _ in ranges):
            return frozenset({0})
        return frozenset({0, int(Path("/proc/sys/kernel/overflowuid").read_text())})
    except (OSError, ValueError):
        return frozenset({0})


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[int]:
    """A descriptor of a private folder, which stays the same folder even if its path later leads elsewhere.

    Raises:
        OSError: The folder does not exist, or is no longer private.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        info = os.fstat(descriptor)
        if info.st_uid != os.getuid() or _shared(info):
            raise PermissionError(f"{folder} is no longer private")
        yield descriptor
    finally:
        os.close(descriptor)


def read_own(name: str, folder: int) -> bytes | None:
    """The content of a file, or None unless it is this user's own: regular, under one name, not writable by others.

    Args:
        name: Name of the file.
        folder: Descriptor of the folder.

    Raises:
        OSError: The file cannot be read.
    """
    # Non-blocking, since opening a pipe that somebody put there would wait.
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with open(descriptor, "rb") as file:
        info = os.fstat(descriptor)
        own = info.st_uid == os.getuid() and info.st_nlink == 1 and not _shared(info)
        return file.read() if own and stat.S_ISREG(info.st_mode) else None


def has_room(folder: Path) -> bool:
    """Whether a file can still be written to a folder: the disk is not full, nor read-only, nor is a quota used up."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
    except OSError:
        return False
    return True
