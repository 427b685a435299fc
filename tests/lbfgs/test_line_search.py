"""Line searches, as functions of a number."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from lightning_optim.optimizers.lbfgs.line_search import C1, C2, Phi, Point, armijo, estimate_noise, strong_wolfe

Function = Callable[[float], float]


def more_thuente(t: float) -> tuple[float, float]:
    """Function 1 of Moré and Thuente (1994): concave near 0, minimum at sqrt(2)."""
    return -t / (t * t + 2), (t * t - 2) / (t * t + 2) ** 2


def steep(t: float) -> tuple[float, float]:
    """Their function 2: the minimum at 1.6 is hard to see from far away."""
    u = t + 0.004
    return u**5 - 2 * u**4, 5 * u**4 - 8 * u**3


def barrier(t: float) -> tuple[float, float]:
    """Not there beyond 1e-3: an overflow, say."""
    return (-math.log(1e-3 - t) - 3000 * t, 1 / (1e-3 - t) - 3000) if t < 1e-3 else (math.inf, math.nan)


FUNCTIONS: dict[str, Phi] = {"concave": more_thuente, "steep": steep, "barrier": barrier}


class Counted:
    def __init__(self, phi: Phi) -> None:
        self.phi, self.tried = phi, list[float]()

    def __call__(self, t: float) -> tuple[float, float]:
        self.tried.append(t)
        return self.phi(t)


@pytest.mark.parametrize("first", [1e-3, 0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_strong_wolfe_conditions(name: str, first: float) -> None:
    phi = Counted(FUNCTIONS[name])
    start = Point(0.0, *phi.phi(0.0))
    found = strong_wolfe(phi, start, t=first)
    assert found is not None
    assert found.value <= start.value + C1 * found.t * start.slope
    assert abs(found.slope) <= -C2 * start.slope
    assert phi.tried[-1] == found.t, "the accepted point is the one at which the function was evaluated last"
    assert (found.value, found.slope) == phi.phi(found.t)
    assert len(phi.tried) <= 20


@pytest.mark.parametrize("first", [1e-3, 1.0, 30.0])
def test_a_tighter_curvature_condition_is_met_too(first: float) -> None:
    start = Point(0.0, *more_thuente(0.0))
    found = strong_wolfe(more_thuente, start, t=first, c2=1e-4)
    assert found is not None
    assert found.t == pytest.approx(math.sqrt(2), rel=1e-3)


@pytest.mark.parametrize("first", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_armijo_condition(name: str, first: float) -> None:
    phi = Counted(FUNCTIONS[name])
    start = Point(0.0, *phi.phi(0.0))
    found = armijo(phi, start, t=first)
    assert found is not None
    assert found.value <= start.value + C1 * found.t * start.slope
    assert phi.tried[-1] == found.t
    assert all(0.1 * a <= b <= 0.5 * a for a, b in zip(phi.tried, phi.tried[1:], strict=False) if phi.phi(a)[0] < 1e9)


@pytest.mark.parametrize("search", [strong_wolfe, armijo])
def test_nothing_acceptable(search: Callable[..., Point | None]) -> None:
    """A slope that lies, and values that are nowhere finite: bounded, and None."""
    for phi in (lambda t: (t, -1.0), lambda t: (math.inf, math.nan), lambda t: (math.nan, 0.0)):
        counted = Counted(phi)
        assert search(counted, Point(0.0, 0.0, -1.0), evaluations=9) is None
        assert len(counted.tried) == 9


def test_when_the_evaluations_run_out_the_best_is_taken() -> None:
    found = strong_wolfe(lambda t: (-t, -1.0), Point(0.0, 0.0, -1.0), evaluations=3)  # goes down for ever
    assert found == Point(100.0, -100.0, -1.0)
    start = Point(0.0, *steep(0.0))
    found = strong_wolfe(steep, start, c2=1e-12, evaluations=5)
    assert found is not None
    assert found.value < start.value


def test_slack_takes_noise_for_what_it_is() -> None:
    """A value that is higher by rounding is no reason to go back."""
    flat = 1.0 + 1e-12, -1e-14
    start = Point(0.0, 1.0, -1e-13)
    assert strong_wolfe(lambda t: flat, start, evaluations=8) is None
    assert armijo(lambda t: flat, start, evaluations=8) is None
    assert strong_wolfe(lambda t: flat, start, slack=2e-12) == Point(1.0, *flat)
    assert armijo(lambda t: flat, start, slack=2e-12) == Point(1.0, *flat)


def test_cubic_interpolation_is_exact_for_cubics() -> None:
    def cubic(t: float) -> tuple[float, float]:
        return t**3 - 3 * t, 3 * t * t - 3  # minimum at 1

    counted = Counted(cubic)
    found = strong_wolfe(counted, Point(0.0, 0.0, -3.0), t=1.9, c2=0.1)
    assert counted.tried == [1.9, pytest.approx(1.0, abs=1e-12)]
    assert found is not None


@pytest.mark.parametrize("scale", [1e-6, 1e-2])
def test_noise_is_measured(scale: float) -> None:
    """Within a factor of three, median of many draws; the smooth part does not count."""
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(40):
        errors = torch.randn(7, generator=generator, dtype=torch.float64)
        estimates.append(estimate_noise([math.exp(1e-3 * i) + scale * float(e) for i, e in enumerate(errors)]))
    assert scale / 3 < float(torch.tensor(estimates).median()) < 3 * scale
    assert estimate_noise([math.exp(1e-3 * i) for i in range(7)]) < 1e-14
    assert estimate_noise([1.0, math.inf, 1.0, 1.0]) == math.inf
