"""A thread that does jobs one after the other, each of them once, whatever breaks off around it.

An interrupt (Ctrl-C) comes up in the main thread, at any place: while it hands a job over, or waits for it. What has
been handed over may then be handed over again, or waited for again, and the job is still done once. No failure, in a
job or beside it, ends the thread. (The executors of ``concurrent.futures`` promise neither.)
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any


class Job:
    """Something that is done once.

    Args:
        work: What is done.
        twice: Do it once more if it fails: it goes on where it was, for others that depend on it. The error that is
            told is the first.
    """

    def __init__(self, work: Callable[[], None], *, twice: bool = False) -> None:
        self._work: Callable[[], None] | None = work
        self._twice = twice
        self._error: BaseException | None = None
        self._ended = self._opened = False
        self._gate = threading.Lock()  # held until the end: who waits, waits for it
        self._gate.acquire()
        self._process = os.getpid()

    def __call__(self) -> None:
        """Do it, unless it was done or begun before."""
        work, self._work = self._work, None
        try:
            if work is not None:
                work()
            elif not self._ended:  # begun, and broken off between the work and its end
                self._error = self._error or RuntimeError("a job was broken off")
        except BaseException as error:  # who waits for it must know
            self._error = error
            if work is not None and self._twice:
                self._go_on(work, error)
        self._ended = True
        if not self._opened:
            with suppress(RuntimeError):  # opened already, and broken off before that was noted
                self._gate.release()
            self._opened = True

    @staticmethod
    def _go_on(work: Callable[[], None], first: BaseException) -> None:
        try:
            work()
        except BaseException as again:
            first.add_note(f"It was tried once more, in vain: {type(again).__name__}: {again}")

    def done(self) -> bool:
        """Whether it has ended."""
        return self._ended

    def exception(self) -> BaseException | None:
        """Wait for its end; what went wrong, if anything did.

        Raises:
            RuntimeError: This is another process, forked from the one whose thread has the job.
        """
        while not self._ended:
            if os.getpid() != self._process:
                raise RuntimeError(
                    "this process was forked while the pipeline was at work, and what was under way is not here; "
                    "valid: fork between two steps, or make the pipeline in the process that steps"
                )
            with self._gate:
                pass
        return self._error

    def result(self) -> None:
        """Wait for its end.

        Raises:
            BaseException: What went wrong.
        """
        if (error := self.exception()) is not None:
            raise error


class Worker:
    """The thread. A process that is forked has none of its parent's: it makes its own.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self.closed = False
        self._name = name
        self._begin()

    def do(self, job: Job) -> None:
        """Have a job done after all that were handed over before. It may be handed over again: it is done once.

        Raises:
            RuntimeError: The worker is closed.
        """
        if self.closed:
            raise RuntimeError("the pipeline takes no job after shutdown: it was closed; valid: make another one")
        if os.getpid() != self._process:
            self._begin()
        self._jobs.put(job)

    def close(self) -> None:
        """End the thread, when all jobs are done."""
        self.closed = True
        self._end()

    def _begin(self) -> None:
        jobs: SimpleQueue[Job | None] = SimpleQueue()
        thread = threading.Thread(target=_serve, args=(jobs,), name=self._name, daemon=True)
        thread.start()
        # At exit too: torch is not to be at work while the interpreter ends.
        end = weakref.finalize(self, _end, jobs, thread, os.getpid())
        self._jobs, self._end, self._process = jobs, end, os.getpid()


def _serve(jobs: SimpleQueue[Job | None]) -> None:
    job: Any = None
    while True:
        try:
            if job is None:
                job = jobs.get()
                if job is None:
                    return
            job()
            job = None
        except BaseException:  # noqa: S112 # beside a job, which is tried again: it knows whether it was begun
            continue


def _end(jobs: SimpleQueue[Job | None], thread: threading.Thread, process: int) -> None:
    if os.getpid() == process:
        jobs.put(None)
        if thread is not threading.current_thread():
            thread.join()
