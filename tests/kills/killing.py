"""Trainings in processes of their own, which are killed at random moments or inside of a checkpoint's write.

Processes are forked from one that has imported everything and computed nothing: a new interpreter would need longer to
import Lightning than to train.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import fsspec.implementations.local  # type: ignore[import-untyped]
import torch

from .training import BATCHES, CHECKPOINTS, EPOCHS, LAST, train

#: Where a process dies: at a moment that is not its own choice, or in the midst of the write of a checkpoint, or
#: before or after the file gets its name.
Where = Literal["moment", "write", "before the name", "after the name"]
WHERE: tuple[Where, ...] = ("moment", "write", "moment", "before the name", "moment", "after the name")

_OPENER = fsspec.implementations.local.LocalFileOpener


@dataclass(frozen=True)
class Kill:
    """How a process dies.

    Attributes:
        where: See :data:`Where`.
        count: The batch, or the checkpoint, at which it dies, counted from where the process begins.
        share: How far in it: of a checkpoint's bytes that are written, or of some ten milliseconds that pass.
    """

    where: Where
    count: int
    share: float

    @classmethod
    def drawn(cls, where: Where, rng: random.Random) -> Kill:
        """One at random."""
        last = EPOCHS * BATCHES if where == "moment" else 8
        return cls(where, rng.randrange(last), rng.random())


def run(name: str, folder: Path, kill: Kill | None = None) -> bool:
    """Train in a new process, from the last good checkpoint in a folder on.

    Args:
        name: The configuration.
        folder: Where the run has its files; those of processes that died before may be there.
        kill: How it dies; None to let it live.

    Returns:
        Whether it came to its end.

    Raises:
        RuntimeError: It ended by itself in another way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        _live(name, folder, kill, tell)
    os.close(tell)
    with os.fdopen(told, "rb", buffering=0) as batches:
        if kill is not None and kill.where == "moment" and len(_read(batches, kill.count + 1)) > kill.count:
            time.sleep(kill.share * 0.01)
            os.kill(child, signal.SIGKILL)
        _read(batches, sys.maxsize)  # until it has ended
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{name} in {folder}: exit code {code}; see {folder / 'error.txt'}")
    return code == 0


def last_good_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps of those in a folder; None if there is none.

    Raises:
        RuntimeError: A file that has a checkpoint's name is not a whole one.
    """
    found: list[tuple[int, str, Path]] = []
    for path in (folder / CHECKPOINTS).glob("*.ckpt"):
        try:
            steps = torch.load(path, weights_only=True)["global_step"]
        except Exception as error:  # of whatever kind
            raise RuntimeError(f"{path} is not a whole checkpoint") from error
        found.append((steps, path.name, path))
    return max(found)[2] if found else None


def end_of(folder: Path) -> dict[str, Any]:
    """The last state of a run that came to its end."""
    return torch.load(folder / LAST, weights_only=True)


def _live(name: str, folder: Path, kill: Kill | None, tell: int) -> NoReturn:
    """The life of the process: it must not return into its parent's code."""
    try:
        os.chdir(folder)
        if kill is not None and kill.where != "moment":
            _die_while_writing(kill)
        train(name, last_good_checkpoint(folder), lambda number: _tell(tell))
    except BaseException:
        Path(folder, "error.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def _tell(pipe: int) -> None:
    os.write(pipe, b".")


def _read(pipe: Any, count: int) -> bytes:
    """So many bytes, or all until the other side has ended."""
    read = b""
    while len(read) < count and (more := pipe.read(min(count - len(read), 4096))):
        read += more
    return read


def _die_while_writing(kill: Kill) -> None:
    """Have this process kill itself at a file that it writes."""
    seen = 0

    def due() -> bool:
        nonlocal seen
        seen += 1
        return seen > kill.count

    write, commit = _OPENER.write, _OPENER.commit

    def half_a_write(self: Any, data: bytes) -> Any:
        if due():
            write(self, data[: int(kill.share * len(data))])
            self.flush()
            _die()
        return write(self, data)

    def commit_or_die(self: Any) -> None:
        last = due()
        if last and kill.where == "before the name":
            _die()
        commit(self)
        if last:
            _die()

    patched: dict[str, Callable[..., Any]] = (
        {"write": half_a_write} if kill.where == "write" else {"commit": commit_or_die}
    )
    for method, replacement in patched.items():
        setattr(_OPENER, method, replacement)


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("the kernel does not let it live")
