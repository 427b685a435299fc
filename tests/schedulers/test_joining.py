"""A schedule that joins an optimizer at any time: its learning rate is its own, in whatever order states are loaded."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, LRScheduler, MultiplicativeLR, SequentialLR, StepLR

import lightning_optim
from lightning_optim.schedulers import WSD, Cosine, Linear
from lightning_optim.warnings import LightningOptimWarning

from .common import advance, sgd

TOTAL = 12


def sequence_after_torchs(optimizer: Optimizer) -> LRScheduler:
    return SequentialLR(
        optimizer, [LinearLR(optimizer, 0.25, total_iters=4), Cosine(optimizer, 1, TOTAL - 4)], milestones=[4]
    )


def sequence(optimizer: Optimizer) -> LRScheduler:
    return SequentialLR(optimizer, [Linear(optimizer, 1, 4), WSD(optimizer, 1, TOTAL - 4)], milestones=[4])


def chain(optimizer: Optimizer) -> LRScheduler:
    return ChainedScheduler([Cosine(optimizer, 2, TOTAL), MultiplicativeLR(optimizer, lambda step: 0.9)])


SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "Cosine": lambda optimizer: Cosine(optimizer, total_steps=TOTAL),
    "Linear": lambda optimizer: Linear(optimizer, 3, TOTAL),
    "WSD": lambda optimizer: WSD(optimizer, 2, TOTAL, decay_steps=5),
    "sequence": sequence,
    "sequence after torch's": sequence_after_torchs,
    "chain": chain,
}
OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {
    "torch's": lambda: sgd(0.3, 0.7),
    "tensor": lambda: sgd(torch.tensor(0.5, dtype=torch.float64)),
    "ours": lambda: lightning_optim.AdamW([torch.zeros(1, requires_grad=True)], lr=0.3),
    "LBFGS": lambda: lightning_optim.LBFGS([torch.zeros(1, requires_grad=True)], lr=0.3),
    "SAM": lambda: lightning_optim.SAM(
        [torch.zeros(1, requires_grad=True)], lambda params: lightning_optim.SGD(params, lr=0.3)
    ),
}
#: make the optimizer, make the schedule, load the optimizer's state, load the schedule's
ORDERS = ["o s O S", "o O s S", "o s S O", "o s S", "o O s S S"]


@pytest.fixture(autouse=True)
def _no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only learning rates are looked at."""
    for cls in (lightning_optim.LBFGS, lightning_optim.SAM):
        monkeypatch.setattr(cls, "step", lambda self, closure=None: None)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("owner", OPTIMIZERS)
def test_every_order_of_making_and_loading(owner: str, kind: str) -> None:
    def make() -> LRScheduler:
        return SCHEDULES[kind](OPTIMIZERS[owner]())

    for at, order in itertools.product((0, 4, TOTAL - 2), ORDERS):
        first = make()
        advance(first, at)
        states = through_a_file({"O": first.optimizer.state_dict(), "S": first.state_dict()})
        want = advance(first, 2)
        made: dict[str, Any] = {}
        for what in order.split():
            if what == "o":
                made["O"] = OPTIMIZERS[owner]()
            elif what == "s":
                made["S"] = SCHEDULES[kind](made["O"])
            else:
                made[what].load_state_dict(copy.deepcopy(states[what]))
        assert made["S"].get_last_lr() == [group["lr"] for group in made["O"].param_groups], (at, order)
        assert advance(made["S"], 2) == want, (at, order)


@pytest.mark.parametrize("kind", [kind for kind in SCHEDULES if kind != "sequence after torch's"])
def test_a_new_schedule_keeps_its_first_rate_where_an_older_optimizer_is_loaded(kind: str) -> None:
    saved = sgd(0.3, 0.7)
    saved.param_groups[0]["lr"] = 0.123
    for order in ("o s O", "o O s"):
        optimizer = sgd(0.3, 0.7)
        if order == "o O s":
            optimizer.load_state_dict(sgd(0.3, 0.7).state_dict())
        schedule = SCHEDULES[kind](optimizer)
        if order == "o s O":
            optimizer.load_state_dict(saved.state_dict())
        assert advance(schedule, TOTAL) == advance(SCHEDULES[kind](sgd(0.3, 0.7)), TOTAL)


def test_a_schedule_that_has_moved_takes_the_rate_that_is_loaded() -> None:
    """The states of both are loaded, the optimizer's last; or the user has put another rate there."""
    schedule = Cosine(sgd(), total_steps=8)
    advance(schedule, 2)
    state = copy.deepcopy(schedule.optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.5
    schedule.optimizer.load_state_dict(state)
    assert schedule.get_last_lr() == [0.5]


def older(state: dict[str, Any]) -> dict[str, Any]:
    """As a version before this one saved it."""
    state = {key: value for key, value in state.items() if key not in ("rates", "filled_for")}
    if "_schedulers" in state:
        state["_schedulers"] = [older(one) for one in state["_schedulers"]]
    return state


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("at", [0, 3, 4, 9])
def test_states_of_an_older_version(kind: str, at: int) -> None:
    first = SCHEDULES[kind](sgd(0.3, 0.7))
    advance(first, at)
    states = copy.deepcopy((first.optimizer.state_dict(), older(first.state_dict())))
    want = advance(first, 2)
    # As Lightning and Accelerate load, and, where torch's own schedules do it too, after the optimizer.
    for order in ("o s O S", "o O s S") if kind in ("Cosine", "Linear", "WSD", "sequence") else ("o s O S",):
        optimizer = sgd(0.3, 0.7)
        if order == "o O s S":
            optimizer.load_state_dict(states[0])
        schedule = SCHEDULES[kind](optimizer)
        if order == "o s O S":
            optimizer.load_state_dict(states[0])
        schedule.load_state_dict(copy.deepcopy(states[1]))
        assert advance(schedule, 2) == want, order


@pytest.mark.parametrize("kind", [kind for kind in SCHEDULES if kind != "chain"])
@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])  # noqa: S301
def test_copies_go_on_and_look_after_their_own_optimizer(kind: str, at: int, copied: Callable[[Any], Any]) -> None:
    first = SCHEDULES[kind](OPTIMIZERS["ours"]())
    advance(first, at)
    optimizer, schedule = copied((first.optimizer, first))
    assert schedule.optimizer is optimizer
    assert optimizer is not first.optimizer
    if at == 0:
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0]["lr"] = 0.9
        optimizer.load_state_dict(state)
    assert advance(schedule, 3) == advance(first, 3)


def test_rates_of_groups_that_were_added_are_told_at_once() -> None:
    schedule = Linear(sgd(0.3), 0, 10)
    advance(schedule, 2)
    schedule.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.9})
    assert schedule.get_last_lr() == [0.3 * schedule.factor(2), 0.9]
    resumed = Linear(sgd(0.3, 0.1), 0, 10)
    resumed.optimizer.load_state_dict(schedule.optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.get_last_lr() == schedule.get_last_lr()
    assert advance(resumed, 3) == advance(schedule, 3)


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), np.array(0.5)])
def test_numpy_numbers_stay_out_of_checkpoints(number: Any) -> None:
    options: dict[str, Any] = {"warmup_steps": np.int64(2), "total_steps": np.int32(10), "min_lr_ratio": np.float32(0)}
    schedule = Cosine(sgd(number), **options)
    advance(schedule, 3)
    schedule.optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": number})
    advance(schedule, 1)
    through_a_file([schedule.state_dict(), [group["initial_lr"] for group in schedule.optimizer.param_groups]])
    # A state in which an older version left some.
    state = {**schedule.state_dict(), "base_lrs": [number, number], "_last_lr": [number, number]}
    resumed = Cosine(sgd(0.5, 0.5), 2, 10)
    resumed.load_state_dict(state)
    through_a_file(resumed.state_dict())


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ({"last_epoch": "3"}, TypeError, "WSD: last_epoch='3' is a str; valid: a whole number"),
        ({"last_epoch": 2.5}, TypeError, r"last_epoch=2\.5 is a float; valid: a whole number"),
        ({"base_lrs": None}, TypeError, "base_lrs=None is a NoneType; valid: a list of learning rates"),
        ({"base_lrs": ["a"]}, TypeError, r"base_lrs\[0\]='a' is a str; valid: a finite number"),
        ({"base_lrs": [1.0, 2.0, 3.0]}, ValueError, "schedules 3 parameter groups but its optimizer has 1"),
        ({"rates": [torch.ones(2)]}, TypeError, r"rates\[0\]=.* is a Tensor; valid: a finite number"),
        ({"_last_lr": 3}, TypeError, "_last_lr=3 is a int; valid: a list"),
        ({"total_steps": 0}, ValueError, "total_steps=0; valid: a whole number >= 1"),
        ({"warmup_steps": None}, TypeError, "warmup_steps=None is a NoneType; valid: a whole number"),
        ({"min_lr_ratio": 7}, ValueError, r"min_lr_ratio=7; valid: a number in \[0, 1\]"),
        ({"factor": 1.0, "step": 2}, ValueError, "factor, step cannot be part of a schedule's state"),
        ({"decay": "exp"}, ValueError, "decay='exp'; valid: 1-sqrt, linear"),
    ],
)
def test_damaged_states_are_refused_by_name(entry: dict[str, Any], error: type[Exception], message: str) -> None:
    schedule = WSD(sgd(), 2, 10)
    before = schedule.state_dict()
    with pytest.raises(error, match=message):
        schedule.load_state_dict({**before, **entry})
    assert schedule.state_dict() == before


def test_the_state_of_another_schedule_gives_its_position_with_a_warning() -> None:
    other = StepLR(sgd(), 2)
    advance(other, 3)
    schedule = Cosine(sgd(), total_steps=10)
    with pytest.warns(LightningOptimWarning, match="another schedule's, since it has no min_lr_ratio, total_steps"):
        schedule.load_state_dict(other.state_dict())
    assert schedule.last_epoch == 3
    assert schedule.get_last_lr() == [schedule.factor(3)] == [schedule.optimizer.param_groups[0]["lr"]]


class Lookahead(Optimizer):
    """As wrappers in wide use are: torch's constructor is not called, and the groups are the inner optimizer's."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.defaults = inner, inner.defaults
        self.param_groups, self.state = inner.param_groups, inner.state

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def test_optimizers_that_have_no_hooks_are_scheduled_too() -> None:
    schedule = Cosine(Lookahead(sgd(0.3)), 2, 10)
    assert advance(schedule, 10) == advance(Cosine(sgd(0.3), 2, 10), 10)
    resumed = Cosine(Lookahead(sgd(0.3)), 2, 10)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.get_last_lr() == schedule.get_last_lr()


def test_schedules_that_are_gone_leave_nothing_behind() -> None:
    optimizer = sgd()
    for _ in range(3):
        Cosine(optimizer, total_steps=5)
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
