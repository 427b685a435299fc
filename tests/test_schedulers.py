"""Schedules against independent closed forms, torch's schedulers, and themselves after a resume."""

from __future__ import annotations

import copy
import io
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

from lightning_optim.schedulers import WSD, Cosine, Linear, Schedule
from lightning_optim.warnings import LightningOptimWarning

Make = Callable[..., Schedule]
SCHEDULES: list[Make] = [Linear, Cosine, WSD]


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_optim.warnings._seen", set())


def sgd(*lrs: float | torch.Tensor) -> torch.optim.SGD:
    lrs = lrs or (1.0,)
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs])


def advance(schedule: LRScheduler, steps: int) -> list[list[float]]:
    """The learning rates of ``steps`` optimizer steps, in which the schedule moves on."""
    seen = []
    for _ in range(steps):
        seen.append([float(group["lr"]) for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
        assert schedule.get_last_lr() == [group["lr"] for group in schedule.optimizer.param_groups]
    return seen


def lrs_of(schedule: LRScheduler, steps: int) -> list[float]:
    return [lrs[0] for lrs in advance(schedule, steps)]


# ---------------------------------------------------------------- values


def expected(kind: str, t: int, warmup: int, total: int, floor: float, start: float | None) -> float:
    """The definitions of the documentation, written for one value at a time."""
    W, T = warmup, total
    if t < W:
        return (t + 1) / (W + 1) if start is None else start + (1 - start) * t / W
    if t >= T:
        return floor
    x = (t - W) / (T - W)
    if kind == "linear":
        return (1 - floor) * (1 - x) + floor
    if kind == "cosine":
        return floor + (1 - floor) * (1 + math.cos(math.pi * x)) / 2
    begin = T - round(0.2 * T)
    return 1.0 if t < begin else floor + (1 - floor) * (1 - ((t - begin) / (T - begin)) ** 0.5)


@pytest.mark.parametrize(("kind", "make"), [("linear", Linear), ("cosine", Cosine), ("wsd", WSD)])
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("start", [None, 0.0, 0.25])
def test_values(kind: str, make: Make, warmup: int, floor: float, start: float | None) -> None:
    schedule = make(sgd(3.0), warmup, 30, min_lr_ratio=floor, warmup_start=start)
    want = [3.0 * expected(kind, t, warmup, 30, floor, start) for t in range(40)]
    assert lrs_of(schedule, 40) == pytest.approx(want, abs=1e-15)


def test_linear_equals_the_formula_of_hugging_face() -> None:
    W, T = 5, 20

    def hugging_face(t: int) -> float:
        return t / max(1, W) if t < W else max(0.0, (T - t) / max(1, T - W))

    ours = lrs_of(Linear(sgd(0.3), W, T, warmup_start=0.0), T + 3)
    assert ours == pytest.approx(lrs_of(LambdaLR(sgd(0.3), hugging_face), T + 3), abs=1e-16)


def test_cosine_equals_torch_until_the_end() -> None:
    T = 25
    ours = lrs_of(Cosine(sgd(0.3), total_steps=T, min_lr_ratio=0.1), T + 1)
    theirs = lrs_of(CosineAnnealingLR(sgd(0.3), T_max=T, eta_min=0.03), T + 1)
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_warmup_start_equals_torch_linear_lr() -> None:
    ours = lrs_of(WSD(sgd(0.3), 8, 20, decay_steps=0, warmup_start=0.25), 15)
    theirs = lrs_of(LinearLR(sgd(0.3), start_factor=0.25, total_iters=8), 15)
    assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize(
    ("decay", "shape"),
    [
        ("1-sqrt", lambda x: 1 - x**0.5),
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
    ],
)
@pytest.mark.parametrize("decay_steps", [8, 0.4])
def test_wsd_decay(decay: Any, shape: Callable[[float], float], decay_steps: int | float) -> None:
    got = lrs_of(WSD(sgd(), 2, 20, decay_steps=decay_steps, decay=decay), 22)
    assert got[:2] == pytest.approx([1 / 3, 2 / 3])
    assert got[2:13] == [1.0] * 11
    assert got[12:20] == pytest.approx([shape(k / 8) for k in range(8)])
    assert got[20:] == [0.0, 0.0]


@pytest.mark.parametrize("make", SCHEDULES)
def test_extremes_stay_in_range_and_never_rise_after_the_warmup(make: Make) -> None:
    for W, T, floor in itertools.product((0, 1, 4, 10), (10, 11, 37), (0.0, 0.3)):
        schedule = make(sgd(), W, T, min_lr_ratio=floor)
        factors = [schedule.factor(t) for t in range(-2, T + 50)]
        assert all(0 <= f <= 1 for f in factors), (W, T, factors)
        after = factors[2 + W :]
        assert after == sorted(after, reverse=True)
        assert after[T - W :] == [floor] * 50


@pytest.mark.parametrize("make", SCHEDULES)
def test_fraction_is_of_the_total(make: Make) -> None:
    assert lrs_of(make(sgd(), 0.1, 70), 75) == lrs_of(make(sgd(), 7, 70), 75)


def test_two_rounded_fractions_may_meet() -> None:
    # 0.5 of 3 rounds to 2 for both; the warmup goes first and the decay has the rest.
    assert lrs_of(WSD(sgd(), 0.5, 3, decay_steps=0.5), 4) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.0])


# ---------------------------------------------------------------- torch's interface


@pytest.mark.parametrize("make", SCHEDULES)
def test_groups_keep_their_ratio(make: Make) -> None:
    both = advance(make(sgd(1.0, 0.25), 3, 12), 14)
    assert [b for _, b in both] == [a * 0.25 for a, _ in both]


@pytest.mark.parametrize("make", SCHEDULES)
def test_tensor_lr_is_written_in_place(make: Make) -> None:
    lr = torch.tensor(0.5, dtype=torch.float64)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=lr, capturable=False, foreach=False)
    tensor = optimizer.param_groups[0]["lr"]
    schedule = make(optimizer, 0.2, None)
    schedule.set_total_steps(10)
    got = lrs_of(schedule, 12)
    assert optimizer.param_groups[0]["lr"] is tensor
    assert got == lrs_of(make(sgd(0.5), 2, 10), 12)
    assert schedule.get_last_lr()[0] is not tensor


def test_compiled_step_does_not_recompile() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.ones(3)
    optimizer = torch.optim.SGD([weight], lr=torch.tensor(1.0), foreach=False)
    schedule = Cosine(optimizer, 2, 8)
    step = torch.compile(optimizer.step, backend=backend)
    seen = []
    for _ in range(6):
        before = weight.detach().clone()
        step()
        seen.append(float((before - weight.detach())[0]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the call of the uncompiled step
            schedule.step()
    assert len(compiled) == 1
    assert seen == pytest.approx([schedule.factor(t) for t in range(6)], abs=1e-6)


@pytest.mark.parametrize("make", SCHEDULES)
def test_resume_is_exact_at_every_step(make: Make) -> None:
    def build() -> Schedule:
        return make(sgd(0.3, 0.7), 0.1, 40, min_lr_ratio=0.05)

    reference = build()
    want = advance(reference, 50)
    for at in range(50):
        first = build()
        advance(first, at)
        file = io.BytesIO()
        torch.save({"o": first.optimizer.state_dict(), "s": first.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        second = build()
        second.optimizer.load_state_dict(saved["o"])
        second.load_state_dict(saved["s"])
        assert second.last_epoch == at
        assert advance(second, 50 - at) == want[at:]


@pytest.mark.parametrize("make", SCHEDULES)
def test_saved_state_does_not_change_afterwards(make: Make) -> None:
    schedule = make(sgd(torch.tensor(0.5)), 2, 10)
    advance(schedule, 3)
    saved = schedule.state_dict()
    frozen = copy.deepcopy(saved)
    schedule.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.1})
    advance(schedule, 3)
    assert saved == frozen


@pytest.mark.parametrize("make", SCHEDULES)
def test_last_epoch_at_construction(make: Make) -> None:
    want = lrs_of(make(sgd(0.3), 4, 20), 20)
    optimizer = sgd(0.3)
    optimizer.param_groups[0]["initial_lr"] = 0.3
    assert lrs_of(make(optimizer, 4, 20, last_epoch=9), 10) == want[10:]
    with pytest.raises(KeyError, match="initial_lr"):
        make(sgd(0.3), 4, 20, last_epoch=9)


@pytest.mark.parametrize("make", SCHEDULES)
def test_deprecated_step_with_an_epoch(make: Make) -> None:
    schedule = make(sgd(), 4, 20)
    schedule.optimizer.step()
    with pytest.warns(UserWarning, match="deprecated"):
        schedule.step(11)
    assert schedule.get_last_lr() == [schedule.factor(11)]
    assert schedule.last_epoch == 11


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_added_group_joins_with_its_lr_as_base(make: Make, as_tensor: bool) -> None:
    lr = torch.tensor(0.9, dtype=torch.float64) if as_tensor else 0.9
    schedule = make(sgd(0.3), 2, 20)
    advance(schedule, 5)
    schedule.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": lr})
    assert advance(schedule, 1)[0][1] == 0.9
    for t in range(6, 12):
        assert advance(schedule, 1) == [[0.3 * schedule.factor(t), 0.9 * schedule.factor(t)]]
    assert schedule.optimizer.param_groups[1]["initial_lr"] == 0.9


def test_lost_group_is_an_error() -> None:
    schedule = Linear(sgd(0.3, 0.1), 2, 20)
    schedule.optimizer.step()
    del schedule.optimizer.param_groups[1]
    with pytest.raises(ValueError, match="schedules 2 parameter groups but its optimizer has 1"):
        schedule.step()


@pytest.mark.parametrize("make", SCHEDULES)
def test_in_sequential_lr(make: Make) -> None:
    alone = lrs_of(make(sgd(0.3), 2, 12), 12)
    optimizer = sgd(0.3)
    parts = [make(optimizer, 2, 12), make(optimizer, 2, 12)]
    assert lrs_of(SequentialLR(optimizer, list(parts), milestones=[8]), 20) == alone[:8] + alone


@pytest.mark.parametrize("make", SCHEDULES)
def test_in_chained_scheduler(make: Make) -> None:
    optimizer = sgd(0.3)
    chain = ChainedScheduler([ConstantLR(optimizer, factor=0.5, total_iters=3), make(optimizer, 2, 12)])
    assert lrs_of(chain, 14) == lrs_of(make(sgd(0.3), 2, 12), 14)


# ---------------------------------------------------------------- the total


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


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("make", SCHEDULES)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"warmup_steps": -1}, ValueError, "warmup_steps=-1 must be 0 or more"),
        ({"warmup_steps": -0.1}, ValueError, r"warmup_steps=-0.1 is neither .* float in \[0, 1\)"),
        ({"warmup_steps": 100.0}, ValueError, r"warmup_steps=100.0 .* int \(100 for 100 steps\)"),
        ({"warmup_steps": 1.0}, ValueError, "warmup_steps=1.0 is neither"),
        ({"warmup_steps": math.nan}, ValueError, "warmup_steps=nan is neither"),
        ({"warmup_steps": math.inf}, ValueError, "warmup_steps=inf is neither"),
        ({"warmup_steps": "10"}, TypeError, "warmup_steps='10' must be an int"),
        ({"warmup_steps": True}, TypeError, "warmup_steps=True must be an int"),
        ({"min_lr_ratio": 1.5}, ValueError, r"min_lr_ratio=1.5 must be in \[0, 1\]"),
        ({"min_lr_ratio": -0.1}, ValueError, "min_lr_ratio=-0.1 must be in"),
        ({"min_lr_ratio": math.nan}, ValueError, "min_lr_ratio=nan must be in"),
        ({"min_lr_ratio": "0"}, TypeError, "min_lr_ratio='0' must be a float"),
        ({"warmup_start": 2.0}, ValueError, "warmup_start=2.0 must be in"),
        ({"total_steps": 0}, ValueError, "total_steps=0 must be at least 1"),
        ({"total_steps": -1}, ValueError, "total_steps=-1 must be at least 1"),
        ({"total_steps": 10.0}, TypeError, "total_steps=10.0 must be an int"),
        ({"total_steps": math.inf}, TypeError, "total_steps=inf must be an int"),
        ({"warmup_steps": 11, "total_steps": 10}, ValueError, "warmup_steps=11"),
    ],
)
def test_bad_options(make: Make, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(sgd(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "exp"}, "decay='exp' must be one of '1-sqrt', 'linear', 'cosine'"),
        ({"decay_steps": 1.5}, "decay_steps=1.5 is neither"),
        ({"warmup_steps": 0.6, "decay_steps": 0.5}, "must not exceed 1 together"),
        (
            {"warmup_steps": 6, "decay_steps": 5, "total_steps": 10},
            r"warmup_steps=6 \+ decay_steps=5 must not exceed total_steps=10",
        ),
    ],
)
def test_bad_options_of_wsd(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WSD(sgd(), **options)


def test_only_optimizers_are_scheduled_and_the_base_is_abstract() -> None:
    with pytest.raises(TypeError, match=r"Cosine schedules a torch.optim.Optimizer, not Linear"):
        Cosine(torch.nn.Linear(1, 1), 0, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="abstract"):
        Schedule(sgd(), warmup_steps=0, total_steps=1, min_lr_ratio=0, warmup_start=None, last_epoch=-1)  # type: ignore[abstract]
