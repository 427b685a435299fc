"""The spike detector: what it calls a spike, what it does not, and that it is a function of the losses alone."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from lightning_optim.control.rollback.spikes import SpikeDetector, SpikePolicy

NOT_FINITE = [math.nan, math.inf, -math.inf]


def losses(steps: int, seed: int = 0, noise: float = 0.1) -> list[float]:
    """Falling by a power law, with multiplicative noise, as training losses do."""
    generator = random.Random(seed)  # noqa: S311 # no secret
    return [8 * (1 + t) ** -0.2 * math.exp(generator.gauss(0, noise)) for t in range(steps)]


def verdicts(policy: SpikePolicy, values: list[float]) -> list[str]:
    detector = SpikeDetector(policy)
    return [detector.judge(value) for value in values]


# Not 0.5 in linear scale: a log-normal of this width has values 7 of its deviations above its mean, one in 900.
@pytest.mark.parametrize(
    ("scale", "noise"), [*(("log", noise) for noise in (0.0, 0.01, 0.1, 0.5)), ("linear", 0.01), ("linear", 0.1)]
)
def test_ordinary_noise_is_no_spike(scale: Any, noise: float) -> None:
    assert set(verdicts(SpikePolicy(scale=scale), losses(5000, noise=noise))) == {"fine"}


@pytest.mark.parametrize("scale", ["log", "linear"])
@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_a_jump_is_a_spike_and_leaves_no_trace(noise: float, scale: Any) -> None:
    values = losses(1000, noise=noise)
    detector = SpikeDetector(SpikePolicy(scale=scale))
    for value in values:
        assert detector.judge(value) == "fine"
    before = detector.state_dict()
    assert detector.judge(3 * values[-1]) == "spike"
    assert detector.state_dict() == before
    assert detector.judge(values[-1]) == "fine"


def test_mean_and_deviation_are_plain_ones_until_the_window_is_full() -> None:
    detector = SpikeDetector(SpikePolicy(window=8, scale="linear", min_ratio=1.0001))
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    for value in values:
        assert detector.limit == math.inf
        detector.judge(value)
    mean = sum(values) / 8
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 8)
    assert detector.expected == pytest.approx(mean)
    assert detector.limit == pytest.approx(mean + 7 * deviation)


def test_after_that_old_losses_fade() -> None:
    detector = SpikeDetector(SpikePolicy(window=10))
    for _ in range(10):
        detector.judge(4.0)
    for _ in range(100):
        detector.judge(4.2)
    assert detector.expected == pytest.approx(4.2, rel=1e-5)


def test_a_small_rise_is_none_however_quiet_it_was() -> None:
    quiet = [2.0] * 200
    assert verdicts(SpikePolicy(), [*quiet, 2.19])[-1] == "fine"
    assert verdicts(SpikePolicy(), [*quiet, 2.21])[-1] == "spike"
    assert verdicts(SpikePolicy(min_ratio=2.0), [*quiet, 3.99])[-1] == "fine"


@pytest.mark.parametrize("value", NOT_FINITE)
def test_what_is_not_finite_is_a_spike_at_once(value: float) -> None:
    assert verdicts(SpikePolicy(patience=5), [value, 2.0, value]) == ["spike", "fine", "spike"]


def test_patience() -> None:
    fine = [2.0] * 100
    policy = SpikePolicy(patience=3)
    assert verdicts(policy, [*fine, 9.0, 9.0, 9.0, 9.0])[-4:] == ["suspect", "suspect", "spike", "suspect"]
    assert verdicts(policy, [*fine, 9.0, 9.0, 2.0, 9.0, 9.0])[-5:] == [
        "suspect",
        "suspect",
        "fine",
        "suspect",
        "suspect",
    ]


def test_warm_up() -> None:
    assert set(verdicts(SpikePolicy(warmup_steps=6), [2.0] * 5 + [9.0])) == {"fine"}
    assert verdicts(SpikePolicy(warmup_steps=5), [2.0] * 5 + [9.0])[-1] == "spike"


def test_a_fall_is_fine_and_does_not_deafen() -> None:
    """A single loss near zero must not make the deviation so large that nothing is a spike any more."""
    generator = random.Random(0)  # noqa: S311
    values = [2 * math.exp(generator.gauss(0, 0.05)) for _ in range(300)]
    assert verdicts(SpikePolicy(), [*values, 1e-9, 2.0, 6.0])[-3:] == ["fine", "fine", "spike"]


@pytest.mark.parametrize("offset", [0.0, -5.0])
def test_losses_that_are_not_positive(offset: float) -> None:
    """Logarithms are given up, and a new warm-up begins."""
    generator = random.Random(0)  # noqa: S311
    values = [offset + generator.gauss(0, 0.1) for _ in range(300)]
    found = verdicts(SpikePolicy(), [3.0] * 200 + values + [offset + 2.0])
    assert found.index("spike") == len(found) - 1
    detector = SpikeDetector(SpikePolicy())
    for value in [3.0] * 200 + [0.0]:
        detector.judge(value)
    assert detector.limit == math.inf


def test_it_goes_on_where_another_was() -> None:
    policy, values = SpikePolicy(window=20, patience=2), [*losses(200), 30.0, 30.0, *losses(20)]
    expected = verdicts(policy, values)
    assert "spike" in expected
    for stop in (0, 5, 199, 201, 203):
        first, second = SpikeDetector(policy), SpikeDetector(policy)
        found = [first.judge(value) for value in values[:stop]]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert found + [second.judge(value) for value in values[stop:]] == expected


def test_a_policy_that_changed_its_scale_begins_anew() -> None:
    old, new = SpikeDetector(SpikePolicy()), SpikeDetector(SpikePolicy(scale="linear"))
    for value in losses(200):
        old.judge(value)
    new.load_state_dict(old.state_dict())
    assert new.expected is None


def test_another_state_is_refused() -> None:
    with pytest.raises(ValueError, match=r"it has \['mean'\]; valid: \['linear', 'mean'"):
        SpikeDetector(SpikePolicy()).load_state_dict({"mean": 1.0})


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "threshold": ({"threshold": 0.0}, ValueError, "threshold=0.0; valid: a finite number > 0"),
    "nan": ({"threshold": math.nan}, ValueError, "threshold=nan"),
    "type": ({"threshold": "6"}, TypeError, "threshold='6' is a str; valid: a finite number > 0"),
    "window": ({"window": 1}, ValueError, "window=1; valid: a whole number >= 2"),
    "count": ({"window": 1.5}, TypeError, "window=1.5"),
    "bool": ({"patience": True}, TypeError, "patience=True"),
    "warm-up": ({"warmup_steps": 0}, ValueError, "warmup_steps=0"),
    "ratio": ({"min_ratio": 1.0}, ValueError, "min_ratio=1.0; valid: a finite number > 1"),
    "patience": ({"patience": 0}, ValueError, "patience=0"),
    "scale": ({"scale": "cubic"}, ValueError, "scale='cubic'; valid: log, linear"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_refused_at_once(case: str) -> None:
    options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        SpikePolicy(**options)
