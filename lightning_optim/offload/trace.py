"""A record of what happened when, from which it can be seen that nothing happened too early."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Something that took a while.

    Attributes:
        kind: ``"fetch"``, ``"fold"``, ``"norm"``, ``"update"``, ``"undo"`` or ``"send"``.
        label: The label of its bucket.
        begin: When it began, in seconds.
        end: When it ended, in seconds.
    """

    kind: str
    label: str
    begin: float
    end: float


class Trace:
    """Events, in the order in which they ended. Any thread may add one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._lock = threading.Lock()

    @contextmanager
    def record(self, kind: str, label: str) -> Iterator[None]:
        """Record what is done in the block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(kind, label, begin)

    def add(self, kind: str, label: str, begin: float) -> None:
        """Record what began at ``begin`` and ends now."""
        with self._lock:
            self.events.append(Event(kind, label, begin, time.perf_counter()))

    def of(self, kind: str, label: str | None = None) -> list[Event]:
        """The events of a kind, of one bucket or of all."""
        return [event for event in self.events if event.kind == kind and label in (None, event.label)]
