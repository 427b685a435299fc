"""Raising at a chosen call of what a test runs, as an interrupt or a lack of memory may."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class Interrupted(BaseException):
    """As KeyboardInterrupt: no error that anyone would handle."""


class Interrupt:
    """Runs something, and raises :class:`Interrupted` at its n-th call of a function, of Python or of C.

    Args:
        number: Which call, from 0.
        within: Counts calls only where it says yes of the frame: the one that is entered, or that calls into C.
    """

    def __init__(self, number: int, within: Callable[[Any], bool]) -> None:
        self._left, self._within = number, within
        self.raised = False

    def __call__(self, run: Callable[[], Any]) -> bool:
        """Whether there are as many calls. (Python ignores what is raised where it frees a generator.)"""
        self.begin()
        self.run(run)
        return self.raised

    def run(self, run: Callable[[], Any]) -> None:
        """Run something that calls :meth:`begin`, and perhaps :meth:`end`, by itself."""
        try:
            run()
        except Interrupted:
            pass
        finally:
            self.end()

    def begin(self) -> None:
        """Count from here on."""
        sys.setprofile(self._count)

    def end(self) -> None:
        """Count no more."""
        sys.setprofile(None)

    def _count(self, frame: Any, event: str, _: Any) -> None:
        if self.raised or event not in ("call", "c_call") or not self._within(frame):
            return
        self._left -= 1
        if self._left < 0:
            self.raised = True
            raise Interrupted


def ours(frame: Any) -> bool:
    """Whether a frame is of this package."""
    return "lightning_optim/" in frame.f_code.co_filename
