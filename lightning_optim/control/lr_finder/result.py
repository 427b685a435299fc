"""The result of a range test: its curve, what it suggests, and how it is written down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_optim.checks import check_choice
from lightning_optim.control.lr_finder.suggestions import METHODS, Method, Suggestion, suggest
from lightning_optim.control.lr_finder.sweep import Mode, Sweep

#: The names of the files that :meth:`RangeTest.save` writes.
JSON_FILE, PNG_FILE = "lr_finder.json", "lr_finder.png"


@dataclass(frozen=True)
class RangeTest:
    """The curve of a range test, and what it suggests.

    Attributes:
        lrs: The learning rates that were tried. With several param groups, the highest among them.
        losses: The loss before the step with each of them.
        smoothed: Their moving average.
        reference: The highest learning rate of the param groups when the test began, without the factor of a schedule.
            To apply a suggestion, all learning rates are multiplied by the suggestion divided by this.
        mode: How the learning rates were spaced.
        stopped: Why the test ended early, in words; None: it did not.
        method: The method whose suggestion is :attr:`suggestion`.
        suggestions: What each method suggests.

    Example:
        >>> sweep = Sweep()
        >>> for exponent in range(-60, 10):
        ...     lr = 10 ** (exponent / 10)
        ...     goes_on = sweep.add(lr, 2 - lr / (lr + 1e-3) + 20 * lr)
        ...     if not goes_on:
        ...         break
        >>> test = RangeTest.of(sweep, reference=0.1)
        >>> test.suggestion, test.stopped
        (0.00158, 'the loss diverged at lr=0.398')
        >>> RangeTest.from_dict(test.as_dict()) == test
        True
    """

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]
    reference: float
    mode: Mode = "exponential"
    stopped: str | None = None
    method: Method = "steepest"
    suggestions: dict[Method, Suggestion] = field(default_factory=dict)

    @classmethod
    def of(cls, sweep: Sweep, reference: float, mode: Mode = "exponential", method: Method = "steepest") -> RangeTest:
        """The result of a sweep.

        Args:
            sweep: What was measured.
            reference: See :attr:`reference`.
            mode: See :attr:`mode`.
            method: See :attr:`method`.
        """
        found = suggest(sweep.lrs, sweep.losses, sweep.smoothed, stopped=sweep.stopped is not None)
        check_choice("", "method", method, METHODS)
        lrs, losses, smoothed = list(sweep.lrs), list(sweep.losses), list(sweep.smoothed)
        return cls(lrs, losses, smoothed, reference, mode, sweep.stopped, method, found)

    @property
    def suggestion(self) -> float | None:
        """The learning rate that the chosen method suggests; None: there is no sound one."""
        return self.suggestions[self.method].lr

    @property
    def reason(self) -> str:
        """Where the suggestion comes from, or why there is none."""
        return self.suggestions[self.method].reason

    def as_dict(self) -> dict[str, Any]:
        """The result as primitives, fit for JSON and for checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> RangeTest:
        """The result that :meth:`as_dict` has written."""
        suggestions = {name: Suggestion(**suggestion) for name, suggestion in saved["suggestions"].items()}
        return cls(**{**saved, "suggestions": suggestions})

    def table(self) -> str:
        """The suggestions as lines of text; the chosen one is marked."""
        ended = f"; it ended early: {self.stopped}" if self.stopped else ""
        span = f" from lr={self.lrs[0]:.3g} to lr={self.lrs[-1]:.3g}" if self.lrs else ""
        head = f"range test: {len(self.lrs)} steps{span}{ended}"
        if len({found.reason for found in self.suggestions.values()}) == 1:
            return f"{head}\nno suggestion: {self.reason}"
        rows = [
            (">" if name == self.method else " ", name, "none" if found.lr is None else f"{found.lr:g}", found.reason)
            for name, found in self.suggestions.items()
        ]
        return "\n".join([head, *(f"{mark} {name:<9} {lr:>10}  {reason}" for mark, name, lr, reason in rows)])

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``lr_finder.json`` into a folder and, if Matplotlib is installed, ``lr_finder.png``.

        Args:
            folder: The folder; it is made if it is not there.

        Returns:
            The files that were written.
        """
        from lightning_optim.control.lr_finder.plot import can_plot

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JSON_FILE).write_text(json.dumps(self.as_dict(), indent=2) + "\n")
        if not can_plot():
            return [folder / JSON_FILE]
        self.plot(folder / PNG_FILE)
        return [folder / JSON_FILE, folder / PNG_FILE]

    def plot(self, path: str | Path) -> None:
        """Draw the curve with the suggestions, and save it: see :func:`~lightning_optim.control.lr_finder.plot.plot`.

        Args:
            path: The file; its ending says which format, such as ``.png``.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed.
            ValueError: There is no point to draw.
        """
        from lightning_optim.control.lr_finder.plot import plot

        plot(self, path)
