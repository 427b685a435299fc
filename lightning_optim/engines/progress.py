"""How far a step has come, so that one that an interrupt or an error cuts short is brought to its end.

Weights and state are overwritten in place: there is no way back to the old step that would not cost a copy of them. So
a step that has begun to write goes on. For that, an engine divides its work into parts; each is computed first, without
a trace, and then written by a list of calls that is kept until all of them are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from operator import call
from typing import Any

#: How often a step that has begun is taken up again. An interrupt may come twice; what fails three times has no memory.
TRIES = 3

Write = Callable[[], Any]


class Progress:
    """How far one bucket has come in one step."""

    def __init__(self) -> None:
        self._finished: list[None] = []
        # In one attribute: nothing can come between the new writes and that none of them is done.
        self._current: tuple[list[Write], list[Any]] = ([], [])

    @property
    def parts(self) -> int:
        """How many parts are written."""
        return len(self._finished)

    @property
    def begun(self) -> bool:
        """Whether anything is written."""
        return bool(self._finished or self._current[1])

    def write(self, writes: Iterable[Write]) -> None:
        """Write the next part.

        Args:
            writes: Calls in their order, each of which either does all that it does, or nothing, or the same when it
                is called again.
        """
        self.prepare(writes)
        self.finish()

    def prepare(self, writes: Iterable[Write]) -> None:
        """Say what the next part is, which :meth:`finish` writes."""
        self._current = ([*writes, partial(self._finished.append, None)], [])

    def finish(self) -> None:
        """Do what is left of the last part, if it was cut short."""
        writes, done = self._current
        # In one call of C, between whose steps Python handles no signal: an interrupt finds a write done and noted
        # down, or neither.
        done.extend(map(call, writes[len(done) :]))
        self._current = ([], [])

    def let_go(self) -> None:
        """Free what a part that cannot be finished has computed."""
        if self.begun:
            self._finished.append(None)  # what is written stays so
        self._current = ([], [])


class IncompleteStepError(RuntimeError):
    """A step could neither be left out nor be finished."""


def carry_through(work: Callable[[], None], begun: Callable[[], bool]) -> None:
    """Do work; if something comes in between after it has begun to write, finish it first, and raise that then.

    Args:
        work: Goes on where it was when it is called again.
        begun: Whether anything is written.

    Raises:
        IncompleteStepError: It cannot be finished.
    """
    try:
        work()
    except BaseException as error:
        if not begun():
            raise
        for _ in range(TRIES):
            try:
                work()
            except BaseException as again:
                last = again
            else:
                raise error  # not the one that came after it
        raise IncompleteStepError(
            f"an optimizer step that had begun to write could not be finished ({last!r}), so that only a part of the "
            "weights is updated; valid: go on from a checkpoint"
        ) from error
