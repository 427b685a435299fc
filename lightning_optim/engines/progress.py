"""How far a step has come, so that a step that an interrupt or an error cuts short can be finished.

Weights and state are overwritten in place: going back to the old values would need a copy of them. So a step that has
begun to write is finished. For that, an engine divides its work into parts; each part is first computed, without
writing anything, and then written by a list of calls that is kept until all of them are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from operator import call
from typing import Any

#: How often a step that has begun is tried again. An interrupt may come twice; a step that fails three times cannot
#: be finished: there is no memory, say.
TRIES = 3

Write = Callable[[], Any]


class Progress:
    """How far one bucket has come in one step."""

    def __init__(self) -> None:
        self._finished: list[None] = []
        # Both in one attribute, so that they change at once: new writes, and the results of those that are done.
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
            writes: Calls in order. Each either completes or does nothing, or has the same effect when it is called
                again.
        """
        self.prepare(writes)
        self.finish()

    def prepare(self, writes: Iterable[Write]) -> None:
        """Set the calls of the next part, which :meth:`finish` makes."""
        self._current = ([*writes, partial(self._finished.append, None)], [])

    def finish(self) -> None:
        """Do what is left of the last part, if it was cut short."""
        writes, done = self._current
        # In one call of C, within which Python handles no signals: at an interrupt, a write is either done and
        # recorded, or neither.
        done.extend(map(call, writes[len(done) :]))
        self._current = ([], [])

    def let_go(self) -> None:
        """Free what a part that cannot be finished has computed."""
        if self.begun:
            self._finished.append(None)  # so that `begun` stays true
        self._current = ([], [])


class IncompleteStepError(RuntimeError):
    """A step could neither be left out nor be finished."""


def carry_through(work: Callable[[], None], begun: Callable[[], bool]) -> None:
    """Do work; if an exception comes after it has begun to write, finish the work first, then raise the exception.

    Args:
        work: The work, which goes on where it was when it is called again.
        begun: Whether anything is written.

    Raises:
        IncompleteStepError: The work cannot be finished.
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
