"""Raising at a chosen call of what a test runs, as an interrupt or a lack of memory may."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Interrupted(BaseException):
    """As KeyboardInterrupt: no error that anyone would handle."""


class Interrupt:
    """Runs something, and raises :class:`Interrupted` at its n-th call of a function, of Python or of C.

    Args:
        number: Which call, from 0.
        within: Counts calls only where it says yes of the frame: the one that is entered, or that calls into C.

    Attributes:
        calls: How many were counted.
        raised: Whether there were as many as that.
    """

    def __init__(self, number: int, within: Callable[[Any], bool]) -> None:
        self._number, self._within = number, within
        self.calls, self.raised = 0, False

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
        torch.set_grad_enabled(True)  # an interrupt in the end of torch's own `no_grad` leaves it off

    def _count(self, frame: Any, event: str, _: Any) -> None:
        if self.raised or event not in ("call", "c_call") or not self._within(frame):
            return
        self.calls += 1
        if self.calls > self._number:
            self.raised = True
            raise Interrupted


def ours(frame: Any) -> bool:
    """Whether a frame is of this package."""
    return "lightning_optim/" in frame.f_code.co_filename


def anywhere(frame: Any) -> bool:
    """Whether a frame is of anything but the interrupting itself."""
    return bool(frame.f_code.co_filename != __file__)


def is_one_of(now: Sequence[Tensor], *whole: Sequence[Tensor]) -> bool:
    """Whether tensors are, all together, those of before a step or those of after it: no mixture."""
    return any(all(torch.equal(a, b) for a, b in zip(now, then, strict=True)) for then in whole)
