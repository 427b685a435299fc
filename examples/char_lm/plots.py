"""The picture of a run: bits per byte above, learning rate below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure


class Step(NamedTuple):
    """One training step as it is drawn."""

    step: int
    bpb: float
    lr: float


class Validation(NamedTuple):
    """One validation, after ``step`` training steps."""

    step: int
    bpb: float


def plot_curves(train: Sequence[Step], val: Sequence[Validation], path: Path) -> None:
    """Draw the training and validation curves with the learning rate under them, and save a PNG.

    ``Figure`` is used without ``pyplot``: nothing global is touched, and no display is needed.
    """
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    loss_axes, lr_axes = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    steps = [point.step for point in train]
    loss_axes.plot(steps, [p.bpb for p in train], color="#9db7d5", linewidth=1, label="train (one batch)")
    loss_axes.plot(
        [p.step for p in val], [p.bpb for p in val], color="#c8553d", marker="o", markersize=3, label="validation"
    )
    if val:
        loss_axes.annotate(
            f"{val[-1].bpb:.2f}", val[-1], xytext=(6, 0), textcoords="offset points", va="center", color="#c8553d"
        )
    loss_axes.set_ylabel("bits per byte")
    loss_axes.set_ylim(bottom=0)
    loss_axes.legend(frameon=False)
    lr_axes.plot(steps, [p.lr for p in train], color="#4a7c59", linewidth=1.5)
    lr_axes.set_ylabel("learning rate")
    lr_axes.set_xlabel("optimizer step")
    lr_axes.set_ylim(bottom=0)
    lr_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (loss_axes, lr_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
