"""Running a compiler that may hang, say too much, or say it in another encoding."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

#: How much of a compiler's output is kept, of its beginning and of its end; a message is far shorter.
KEPT_BYTES = 1 << 14
#: How long to wait for output before looking whether the compiler has ended: it may leave a server behind that keeps
#: the pipe open.
POLL_MILLISECONDS = 50


class CompilerError(Exception):
    """A compiler could not be run, or did not end."""


def call(command: Sequence[str], seconds: float, folder: Path | None = None, **environment: str) -> tuple[int, str]:
    """Run a command to its end.

    Args:
        command: The program and its arguments.
        seconds: After so many seconds the command is killed, with all processes that it has started.
        folder: The folder in which it runs.
        environment: Environment variables in addition to this process's own.

    Returns:
        Its exit status, and the beginning and the end of what it wrote to its two outputs.

    Raises:
        CompilerError: The command could not be started, or was killed.
    """
    # Messages in English and ASCII, so that the compiler's version text does not depend on the user's language.
    variables = {**os.environ, "LC_ALL": "C", **environment}
    deadline = time.monotonic() + seconds
    try:
        process = subprocess.Popen(  # noqa: S603 - the compiler that the user's own PATH or $CC names
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=variables,
            start_new_session=True,  # so that what a wrapper has started can be killed with it
        )
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise CompilerError(str(error)) from error
    try:
        with process:
            try:
                said = _listen(process, deadline)
                process.wait(max(0.0, deadline - time.monotonic()))
            finally:
                _kill(process)
    except subprocess.TimeoutExpired as error:
        raise CompilerError(f"{command[0]} timed out after {seconds:g} seconds") from error
    except OSError as error:
        raise CompilerError(str(error)) from error
    return process.returncode, said.decode("utf-8", "replace")


def _listen(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """The output of a process until it ends, closes its outputs or meets the deadline, without a long middle."""
    assert process.stdout is not None  # noqa: S101 # a pipe
    head = tail = b""
    pipe = select.poll()  # unlike select(), for descriptors of any number
    pipe.register(process.stdout, select.POLLIN)
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        ready = pipe.poll(0 if ended else POLL_MILLISECONDS)
        said = os.read(process.stdout.fileno(), KEPT_BYTES) if ready else b""
        if not said and (ready or ended):
            break
        room = KEPT_BYTES - len(head)
        head, tail = head + said[:room], (tail + said[room:])[-KEPT_BYTES:]
    return head + tail


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
