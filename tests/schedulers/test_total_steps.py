"""The total: given, set later, awaited, filled in and restored."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_optim.schedulers import WSD, Cosine, Linear, Schedule
from lightning_optim.warnings import LightningOptimWarning

from .common import SCHEDULES, Make, advance, lrs_of, sgd


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 5, 0.25])
def test_total_set_later_is_the_total_given(make: Make, warmup: int | float) -> None:
    schedule = make(sgd(0.3), warmup)
    schedule.set_total_steps(20)
    assert lrs_of(schedule, 25) == lrs_of(make(sgd(0.3), warmup, 20), 25)


@pytest.mark.parametrize(
    ("options", "first"),
    [({}, 1.0), ({"warmup_steps": 3}, 0.25), ({"warmup_steps": 0.1, "warmup_start": 0.0}, 0.0)],
)
def test_first_lr_without_a_total(options: dict[str, Any], first: float) -> None:
    assert Cosine(sgd(), **options).get_last_lr() == [first]


def test_first_lr_that_depends_on_the_total_is_left_alone_until_it_is_known() -> None:
    schedule = Cosine(sgd(0.3), warmup_steps=0.1)
    assert schedule.get_last_lr() == [0.3]
    schedule.set_total_steps(40)
    assert schedule.optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0] == 0.3 / 5


@pytest.mark.parametrize("make", SCHEDULES)
def test_step_without_a_total_says_how_to_give_it(make: Make) -> None:
    schedule = make(sgd(), 10)
    schedule.optimizer.step()
    with pytest.raises(RuntimeError, match=r"total_steps=\.\.\. at construction, or call set_total_steps"):
        schedule.step()


def test_awaited_total_lets_the_lr_hold() -> None:
    schedule = Cosine(sgd(0.3), warmup_steps=3)
    schedule.await_total()
    assert lrs_of(schedule, 5) == [0.3 / 4] * 5
    schedule.set_total_steps(20)
    assert schedule.get_last_lr() == [Cosine(sgd(0.3), 3, 20).factor(5) * 0.3]
    assert not schedule.awaits_total


def test_waiting_for_a_total_is_not_restored() -> None:
    waiting = Cosine(sgd())
    waiting.await_total()
    restored = Cosine(sgd())
    restored.load_state_dict(waiting.state_dict())
    with pytest.raises(RuntimeError, match="does not know total_steps"):
        restored.step()


def reload(saved: Schedule, into: Schedule) -> Schedule:
    into.optimizer.load_state_dict(saved.optimizer.state_dict())
    into.load_state_dict(saved.state_dict())
    return into


def filled(total: int, **options: Any) -> Schedule:
    schedule = Cosine(sgd(), **options)
    schedule.set_total_steps(total, filled=True)
    return schedule


def test_filled_total_is_refilled_on_resume_in_either_order() -> None:
    saved = filled(20, warmup_steps=0.1)
    advance(saved, 15)
    want = lrs_of(Cosine(sgd(), 0.1, 40), 50)[15:]

    restored_first = reload(saved, Cosine(sgd(), warmup_steps=0.1))
    assert restored_first.total_steps == 20
    assert restored_first.total_is_filled
    restored_first.set_total_steps(40, filled=True)
    assert lrs_of(restored_first, 35) == want

    assert lrs_of(reload(saved, filled(40, warmup_steps=0.1)), 35) == want


def test_total_given_here_outlives_a_filled_one() -> None:
    saved = filled(20)
    advance(saved, 15)
    resumed = reload(saved, Cosine(sgd(), total_steps=40))
    assert (resumed.total_steps, resumed.total_is_filled) == (40, False)
    assert lrs_of(resumed, 5) == lrs_of(Cosine(sgd(), 0, 40), 20)[15:]


def test_saved_total_that_a_user_gave_is_restored_with_a_warning() -> None:
    saved = Cosine(sgd(), total_steps=20)
    advance(saved, 15)
    with pytest.warns(LightningOptimWarning, match=r"total_steps=20 \(not 44\)"):
        resumed = reload(saved, filled(44))
    assert (resumed.total_steps, resumed.total_is_filled) == (20, False)


def test_replaced_options_are_named() -> None:
    saved = WSD(sgd(), 3, 20, decay="linear")
    with pytest.warns(LightningOptimWarning, match=r"decay='linear' \(not '1-sqrt'\), warmup_steps=3 \(not 5\)"):
        resumed = reload(saved, WSD(sgd(), 5, 20))
    assert lrs_of(resumed, 20) == lrs_of(WSD(sgd(), 3, 20, decay="linear"), 20)


def test_set_total_steps_in_the_middle_keeps_the_position() -> None:
    schedule = Linear(sgd(), 0, 10)
    advance(schedule, 5)
    schedule.set_total_steps(20)
    assert schedule.get_last_lr() == [0.75]
    assert schedule.last_epoch == 5


def test_filled_total_shorter_than_the_warmup_warns_and_a_given_one_is_an_error() -> None:
    schedule = Linear(sgd(), warmup_steps=123)
    with pytest.raises(ValueError, match="warmup_steps=123 must not exceed total_steps=7"):
        schedule.set_total_steps(7)
    with pytest.warns(LightningOptimWarning, match="warmup_steps=123 must not exceed total_steps=7"):
        schedule.set_total_steps(7, filled=True)
    got = lrs_of(schedule, 9)
    assert got[:7] == [(t + 1) / 124 for t in range(7)]
    assert got[7:] == [0.0, 0.0]
