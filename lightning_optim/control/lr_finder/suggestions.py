"""Learning rates that the curve of a range test suggests, each with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

Method = Literal["steepest", "minimum", "valley"]
METHODS: tuple[Method, ...] = get_args(Method)

#: Points without which no curve can be seen.
LEAST_POINTS = 10

#: How far a descent has to go, in standard errors of a mean over a tenth of the points. The lowest of all such means is
#: below the first one for pure noise, too: with 3, one test of noise in six suggests something; with 5, one in 100.
SIGNIFICANT = 5.0

#: The shares of a valley's depth that do not count, at its top and at its bottom. With less at the top, noise on the
#: plateau before it looks like its beginning.
TOP, BOTTOM = 0.2, 0.1

#: Where in the descent of a valley the suggestion lies, from its top (0) to its bottom (1), as fastai chose it.
DOWN_THE_VALLEY = 1 / 2


@dataclass(frozen=True)
class Suggestion:
    """A learning rate, or why there is none.

    Attributes:
        lr: The learning rate, with three digits; None: there is no sound one.
        reason: Where it comes from, or why there is none, in words.
    """

    lr: float | None
    reason: str


def suggest(
    lrs: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], *, stopped: bool
) -> dict[Method, Suggestion]:
    """What each method suggests.

    - ``"steepest"``: where the smoothed loss falls fastest by the log of the learning rate.
    - ``"minimum"``: a tenth of the learning rate at which the smoothed loss is lowest.
    - ``"valley"``: the losses are fitted by a curve that falls and then rises, otherwise of any form (isotonic
      regression). The suggestion lies halfway down its descent, on the axis of log learning rates.

    Args:
        lrs: The learning rates, rising.
        losses: The loss at each one.
        smoothed: The smoothed loss at each one.
        stopped: Whether the test ended early, because the loss diverged.

    Example:
        >>> lrs = [10.0 ** (k / 10) for k in range(-60, 1)]
        >>> losses = [2 - lr / (lr + 1e-3) + 20 * lr for lr in lrs]
        >>> {name: found.lr for name, found in suggest(lrs, losses, losses, stopped=True).items()}
        {'steepest': 0.000794, 'minimum': 0.000631, 'valley': 0.000631}

    References:
        Smith, Cyclical Learning Rates for Training Neural Networks, arXiv:1506.01186.
    """
    reason = _why_none(losses, smoothed, stopped)
    if reason is not None:
        return dict.fromkeys(METHODS, Suggestion(None, reason))
    return {
        "steepest": _steepest(lrs, smoothed),
        "minimum": _minimum(lrs, smoothed),
        "valley": _valley(lrs, losses),
    }


def fit_valley(values: Sequence[float]) -> list[float]:
    """The curve that falls and then rises, and is closest to some values in the sense of least squares.

    Example:
        >>> fit_valley([3.0, 4.0, 1.0, 2.0, 5.0])
        [3.5, 3.5, 1.0, 2.0, 5.0]
    """
    falling = _errors_of_rising([-value for value in values])
    rising = _errors_of_rising([-value for value in reversed(values)])[::-1]
    split = min(range(len(values) + 1), key=lambda k: falling[k] + rising[k])
    return [-value for value in _rising([-value for value in values[:split]])] + _rising(values[split:])


def _why_none(losses: Sequence[float], smoothed: Sequence[float], stopped: bool) -> str | None:
    """Why the curve as a whole suggests nothing; None: it may."""
    count = len(losses)
    if count < LEAST_POINTS:
        return f"there are {count} points, and no curve can be seen in fewer than {LEAST_POINTS}"
    width = max(3, count // 10)
    means = [sum(losses[i : i + width]) / width for i in range(count - width + 1)]
    # From differences of neighbors, so that the trend does not count; their median, so that the divergence does not.
    steps = sorted(abs(b - a) for a, b in pairwise(losses))
    noise = steps[len(steps) // 2] / (0.6745 * math.sqrt(2))
    drop, least = means[0] - min(means), SIGNIFICANT * noise / math.sqrt(width)
    if drop <= max(least, 1e-6 * abs(means[0])):
        if stopped and means.index(min(means)) == 0:
            return "the loss does not fall anywhere before it diverges: lower min_lr, or look at the data and the model"
        return (
            f"the loss does not fall: its lowest mean over {width} steps is {drop:.2g} below the first, and its noise "
            f"{noise:.2g}; more steps, larger batches, or a higher max_lr may show a descent"
        )
    if not stopped and smoothed.index(min(smoothed)) == count - 1 and means.index(min(means)) == len(means) - 1:
        return "the loss still falls at the end of the range: raise max_lr"
    return None


def _valley(lrs: Sequence[float], losses: Sequence[float]) -> Suggestion:
    fit = fit_valley(losses)
    lowest = min(fit)
    descent = fit[: fit.index(lowest) + 1]
    depth = descent[0] - lowest
    top = max(i for i, value in enumerate(descent) if value >= descent[0] - TOP * depth)
    bottom = min(i for i, value in enumerate(descent) if value <= lowest + BOTTOM * depth)
    if bottom <= top + 1:
        return Suggestion(None, f"the loss falls at one point only, lr={lrs[bottom]:.3g}: more steps may show a valley")
    lr = math.exp((1 - DOWN_THE_VALLEY) * math.log(lrs[top]) + DOWN_THE_VALLEY * math.log(lrs[bottom]))
    where = f"halfway down the valley from lr={lrs[top]:.3g} to lr={lrs[bottom]:.3g}"
    return Suggestion(_rounded(lr), where)


def _steepest(lrs: Sequence[float], smoothed: Sequence[float]) -> Suggestion:
    reach = max(2, len(lrs) // 20)  # a slope over several points, since that between two of them is noise
    end = smoothed.index(min(smoothed)) + 1
    logs = [math.log10(lr) for lr in lrs]
    slopes = {
        i: _slope(logs[i - reach : i + reach + 1], smoothed[i - reach : i + reach + 1])
        for i in range(reach, min(end, len(lrs) - reach))
    }
    if not slopes:
        return Suggestion(None, "the loss is lowest within the first points: lower min_lr")
    best = min(slopes, key=lambda i: slopes[i])
    if slopes[best] >= 0:
        return Suggestion(None, "the smoothed loss falls nowhere before its minimum: more steps may show a descent")
    if best == reach:
        return Suggestion(None, f"the loss falls fastest at the beginning of the range, lr={lrs[0]:.3g}: lower min_lr")
    return Suggestion(_rounded(lrs[best]), "the smoothed loss falls fastest there")


def _minimum(lrs: Sequence[float], smoothed: Sequence[float]) -> Suggestion:
    lr = lrs[smoothed.index(min(smoothed))]
    if lr / 10 < lrs[0]:
        return Suggestion(
            None, f"a tenth of lr={lr:.3g}, where the smoothed loss is lowest, is below the range: lower min_lr"
        )
    return Suggestion(_rounded(lr / 10), f"a tenth of lr={lr:.3g}, where the smoothed loss is lowest")


def _slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of the line through points, in the sense of least squares."""
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def _rounded(lr: float) -> float:
    return float(f"{lr:.3g}")


def _rising(values: Sequence[float]) -> list[float]:
    """The rising curve that is closest to some values: isotonic regression, by pooling adjacent violators."""
    blocks: list[_Block] = []
    for value in values:
        _pool(blocks, value)
    return [block.mean for block in blocks for _ in range(block.count)]


def _errors_of_rising(values: Sequence[float]) -> list[float]:
    """The squared error of :func:`_rising` for the first 0, 1, 2, ... values."""
    blocks: list[_Block] = []
    errors = [0.0]
    for value in values:
        errors.append(errors[-1] + _pool(blocks, value))
    return errors


@dataclass(frozen=True)
class _Block:
    """Neighbors that the closest rising curve gives one value."""

    mean: float
    count: int


def _pool(blocks: list[_Block], value: float) -> float:
    """Add a value to the blocks of a rising curve; returns by how much its squared error grows."""
    block, grown = _Block(value, 1), 0.0
    while blocks and blocks[-1].mean > block.mean:
        before = blocks.pop()
        count = before.count + block.count
        grown += (before.mean - block.mean) ** 2 * before.count * block.count / count
        block = _Block((before.mean * before.count + block.mean * block.count) / count, count)
    blocks.append(block)
    return grown
