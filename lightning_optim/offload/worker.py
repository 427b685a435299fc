"""A thread that does jobs one after the other, each of them once, even if an interrupt hits the thread that waits.

An interrupt (Ctrl-C) comes up in the main thread, at any place, such as while it hands a job over or waits for it. A
job may then be handed over again, or waited for again, and is still done once. No failure, in a job or beside it, ends
the thread. (The executors of ``concurrent.futures`` promise neither.)
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
        work: Does the work.
        twice: Call ``work`` once more if it fails: it then goes on where it was, because others depend on it. The
            first error is the one that is reported.
    """

    def __init__(self, work: Callable[[], None], *, twice: bool = False) -> None:
        self._work: Callable[[], None] | None = work
        self._twice = twice
        self._error: BaseException | None = None
        self._ended = self._opened = False
        self._gate = threading.Lock()  # held until the job's end, which others wait for by it
        self._gate.acquire()
        self._process = os.getpid()

    def __call__(self) -> None:
        """Do the work, unless it was done or begun before."""
        work, self._work = self._work, None
        try:
            if work is not None:
                work()
            elif not self._ended:  # begun, and broken off between the work and its end
                self._error = self._error or RuntimeError("a job was broken off")
        except BaseException as error:  # whoever waits for the job must know
            self._error = error
            if work is not None and self._twice:
                self._go_on(work, error)
        self._ended = True
        if not self._opened:
            with suppress(RuntimeError):  # released already, and broken off before that was noted
                self._gate.release()
            self._opened = True

    @staticmethod
    def _go_on(work: Callable[[], None], first: BaseException) -> None:
        try:
            work()
        except BaseException as again:
            first.add_note(f"It was tried once more, in vain: {type(again).__name__}: {again}")

    def done(self) -> bool:
        """Whether the job has ended."""
        return self._ended

    def exception(self) -> BaseException | None:
        """Wait for the job's end, and return what went wrong, if anything did.

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
        """Wait for the job's end.

        Raises:
            BaseException: What went wrong in it.
        """
        if (error := self.exception()) is not None:
            raise error


class Worker:
    """The thread that does jobs. A forked process does not have its parent's thread, and makes its own.

    Args:
        name: The thread's name.
    """

    def __init__(self, name: str) -> None:
        self.closed = False
        self._name = name
        self._begin()

    def do(self, job: Job) -> None:
        """Hand a job over, to be done after all that came before. If it is handed over again, it is still done once.

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
        # The thread is ended at exit too, so that torch is not at work while the interpreter ends.
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
        except BaseException:  # noqa: S112 # outside of a job's work; it is called again, and knows if it was begun
            continue


def _end(jobs: SimpleQueue[Job | None], thread: threading.Thread, process: int) -> None:
    if os.getpid() == process:
        jobs.put(None)
        if thread is not threading.current_thread():
            thread.join()
