"""Line searches, which decide how far to go along a direction, as functions of one number.

Each takes the function ``phi(t) -> (value, slope)`` along the direction, with a value of +inf where there is no finite
one (an overflow, say), and returns the step to take, or None if no step that it tried is acceptable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

LineSearch = Literal["strong_wolfe", "armijo"]
LINE_SEARCHES: tuple[str, ...] = get_args(LineSearch)

#: The share of the decrease that the slope promises which a step must bring (Nocedal and Wright, section 3.1).
C1 = 1e-4
#: The share of the slope that may be left at the step's end: 0.9 is their value for quasi-Newton directions.
C2 = 0.9
#: The factor by which a search goes back from a point without a finite value, whose slope says nothing.
BACK_FROM_INFINITY = 0.25
#: While bracketing, a step grows by a factor between these; the larger is that of ``torch.optim.LBFGS``.
LEAST_GROWTH, GROWTH = 1.1, 10.0

Phi = Callable[[float], tuple[float, float]]


@dataclass(frozen=True)
class Point:
    """A point of the line.

    Attributes:
        t: Its place on the line.
        value: The function's value there.
        slope: The function's derivative there.
    """

    t: float
    value: float
    slope: float

    @property
    def finite(self) -> bool:
        """Whether value and slope are finite, so that a step may end here."""
        return math.isfinite(self.value) and math.isfinite(self.slope)


def armijo(
    phi: Phi, start: Point, *, t: float = 1.0, c1: float = C1, slack: float = 0.0, evaluations: int = 25
) -> Point | None:
    """Backtracking: the first step that decreases the function enough; each trial is shorter, by interpolation.

    Args:
        phi: The function.
        start: Its value and slope at 0; the slope is negative.
        t: The first step to try.
        c1: See :data:`C1`.
        slack: How much of a difference between two values is taken for noise.
        evaluations: The largest number of evaluations.

    >>> armijo(lambda t: ((t - 1) ** 2, 2 * (t - 1)), Point(0, 1.0, -2.0), t=4.0).t
    1.0
    """
    for _ in range(evaluations):
        here = Point(t, *phi(t))
        if here.finite and here.value <= start.value + c1 * t * start.slope + slack:
            return here
        t = min(max(_minimum(start, here), 0.1 * t), 0.5 * t) if here.finite else BACK_FROM_INFINITY * t
    return None


def strong_wolfe(
    phi: Phi,
    start: Point,
    *,
    t: float = 1.0,
    c1: float = C1,
    c2: float = C2,
    slack: float = 0.0,
    evaluations: int = 25,
    min_width: float = 0.0,
) -> Point | None:
    """A step that decreases the function enough, to a slope that is flat enough: the strong Wolfe conditions.

    A bracket that must contain such a step is found by going on, and narrowed by cubic interpolation. If the
    evaluations run out, the best step with enough decrease is taken, whatever its slope, even if it is not the last.

    Args:
        phi: The function.
        start: Its value and slope at 0; the slope is negative.
        t: The first step to try.
        c1: See :data:`C1`.
        c2: See :data:`C2`.
        slack: How much of a difference between two values is taken for noise.
        evaluations: The largest number of evaluations.
        min_width: Narrower brackets are not searched.

    References:
        Nocedal and Wright, Numerical Optimization, 2nd edition, algorithms 3.5 and 3.6.

    >>> found = strong_wolfe(lambda t: ((t - 3) ** 2, 2 * (t - 3)), Point(0, 9.0, -6.0), t=0.1)
    >>> abs(found.slope) <= 0.9 * 6
    True
    """

    def enough(point: Point) -> bool:
        return point.finite and point.value <= start.value + c1 * point.t * start.slope + slack

    before, left = start, evaluations
    while True:  # algorithm 3.5: go on until there is a bracket
        if left == 0:
            return before if before.t > 0 else None
        here, left = Point(t, *phi(t)), left - 1
        if not enough(here) or (before.t > 0 and here.value > before.value + slack):
            low, high = before, here
            break
        if abs(here.slope) <= -c2 * start.slope:
            return here
        if here.slope >= 0:
            low, high = here, before
            break
        ahead = _minimum(before, here)
        # A cubic whose minimum lies behind goes down for ever from here.
        t = min(max(ahead, LEAST_GROWTH * here.t), GROWTH * here.t) if ahead > here.t else GROWTH * here.t
        before = here
    while left > 0 and abs(high.t - low.t) > min_width:  # algorithm 3.6: `low` decreases enough, and is the best so far
        t = _inside(low, high)
        if t in (low.t, high.t):
            break  # no number lies between them
        here, left = Point(t, *phi(t)), left - 1
        if not enough(here) or here.value > low.value + slack:
            high = here
            continue
        if abs(here.slope) <= -c2 * start.slope:
            return here
        if here.slope * (high.t - low.t) >= 0:
            high = low
        low = here
    return low if low.t > 0 else None


def _inside(low: Point, high: Point) -> float:
    """The next point between two, not too near to either."""
    width = high.t - low.t
    if not high.finite:
        return low.t + BACK_FROM_INFINITY * width
    share = (_minimum(low, high) - low.t) / width
    return low.t + width * min(max(share, 0.1), 0.9)


def _minimum(a: Point, b: Point) -> float:
    """The minimum of the cubic through two points, which may lie outside of them; the middle if there is none.

    Nocedal and Wright, equation 3.59.
    """
    if a.t == b.t:
        return a.t
    d1 = a.slope + b.slope - 3 * (a.value - b.value) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    if not 0 <= square < math.inf:
        return (a.t + b.t) / 2
    d2 = math.copysign(math.sqrt(square), b.t - a.t)
    below = b.slope - a.slope + 2 * d2
    if below == 0:
        return (a.t + b.t) / 2
    return b.t - (b.t - a.t) * ((b.slope + d2 - d1) / below)


def estimate_noise(values: Sequence[float]) -> float:
    """The standard deviation of a function's error, from its values at equal distances on a short line.

    Smooth parts vanish in higher differences, and noise stays: the first order of differences at which the estimate has
    settled and signs alternate is taken.

    Args:
        values: The values; seven are usual.

    Returns:
        The estimate; 0 if the values show no noise at all.

    References:
        Moré and Wild, Estimating computational noise, SIAM J. Sci. Comput. 33, 2011.

    >>> estimate_noise([float(i) ** 2 for i in range(7)])
    0.0
    """
    differences, levels, alternates = list(values), [], []
    for order in range(1, len(values)):
        differences = [b - a for a, b in pairwise(differences)]
        scale = math.factorial(order) ** 2 / math.factorial(2 * order)
        levels.append(math.sqrt(scale * sum(d * d for d in differences) / len(differences)))
        alternates.append(min(differences) < 0 < max(differences))
    if not all(map(math.isfinite, levels)):
        return math.inf
    for first in range(len(levels) - 2):
        window = levels[first : first + 3]
        if alternates[first] and max(window) <= 4 * min(window):
            return levels[first]
    return min(levels)
