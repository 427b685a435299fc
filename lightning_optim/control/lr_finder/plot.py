"""The picture of a range test, by Matplotlib, which is optional."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_optim.control.lr_finder.result import RangeTest

_COLORS = {"valley": "#c8553d", "steepest": "#4a7c59", "minimum": "#7a5195"}


def can_plot() -> bool:
    """Whether Matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(test: RangeTest, path: str | Path) -> None:
    """Draw losses over learning rates, and mark what is suggested.

    ``Figure`` is used without ``pyplot``: nothing global is touched, and no display is needed. The losses of a
    divergence go beyond the upper edge, so that the descent stays visible.

    Args:
        test: The range test.
        path: The file; its ending says which format, such as ``.png``.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
        ValueError: There is no point to draw.
    """
    if not can_plot():
        raise ModuleNotFoundError("a picture of a range test needs matplotlib: pip install matplotlib")
    if not test.lrs:
        raise ValueError(f"there is no point to draw: {test.stopped}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(test.lrs, test.losses, color="#9db7d5", linewidth=1, label="loss of one step")
    axes.plot(test.lrs, test.smoothed, color="#2f4b7c", linewidth=2, label="smoothed")
    if test.mode == "exponential":
        axes.set_xscale("log")
    low, first = min(test.losses), test.smoothed[0]
    height = max(first - min(test.smoothed), 1e-12 + 0.05 * abs(first))
    shown = [loss for loss in test.losses if loss <= first + height]
    high = max([*shown, first])
    axes.set_ylim(low - 0.08 * (high - low), high + 0.15 * (high - low))
    for name, found in test.suggestions.items():
        if found.lr is None:
            continue
        chosen = name == test.method
        label = f"{name}: lr = {found.lr:g}" + (" (suggested)" if chosen else "")
        axes.axvline(found.lr, color=_COLORS[name], linewidth=2 if chosen else 1, linestyle="-" if chosen else ":")
        nearest = min(range(len(test.lrs)), key=_distance(test.lrs, found.lr))
        axes.plot(
            [found.lr],
            [test.smoothed[nearest]],
            color=_COLORS[name],
            marker="o",
            markersize=9 if chosen else 5,
            linestyle="none",
            label=label,
        )
    axes.set_xlabel(f"learning rate ({'log scale' if test.mode == 'exponential' else 'linear scale'})")
    axes.set_ylabel("training loss before the step")
    title = f"Learning rate range test, {len(test.lrs)} optimizer steps"
    axes.set_title(title if test.suggestion is not None else f"{title}: no sound suggestion", fontsize=11)
    if test.suggestion is None:
        axes.set_title(test.reason, fontsize=8, loc="left", y=-0.27)
    axes.legend(frameon=False, loc="lower left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _distance(lrs: list[float], lr: float) -> Callable[[int], float]:
    """How far each point is from a learning rate."""
    return lambda i: abs(lrs[i] - lr)
