"""Undoing steps: what is decided, how often, what it does to schedules, and what a training is like afterwards."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim.control.rollback.undo import Undo, UndoJudge, UndoPolicy, snapshot_bytes, why_not_undone
from lightning_optim.control.schedules.learning_rates import multiply_learning_rates
from lightning_optim.optimizers.sam import SAM
from lightning_optim.registry import CLOSURE_OPTIMIZERS, OPTIMIZERS
from lightning_optim.schedulers import Cosine

FINE, SPIKE = 1.0, 50.0


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


# --- what is decided


def judge(**options: Any) -> UndoJudge:
    return UndoJudge(UndoPolicy(**{"warmup_steps": 1} | options))


def play(one: UndoJudge, losses: Sequence[float | None], start: int = 0) -> list[str]:
    """What is decided about losses, each of a step that is made unless it is left out."""
    actions: list[str] = []
    for number, loss in enumerate(losses, start=start):
        decision = one.judge(loss, number)
        actions.append(decision.action)
        if not decision.leaves_out:
            one.stepped()
    return actions


def test_a_spike_undoes_the_step_before_it() -> None:
    one = judge()
    assert play(one, [FINE, FINE, SPIKE, FINE]) == ["step", "step", "undo", "step"]
    assert (one.count, one.lr_scale) == (1, 0.5)
    (record,) = one.records
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["step"], record["action"], record["loss"], record["undone"]) == (2, "undo", SPIKE, 1)
    assert "the last step is undone, learning rates are multiplied by 0.5" in record["message"]


def test_only_steps_that_were_made_cost_learning_rate() -> None:
    """After an undo the weights are those of a fine loss: if the next one spikes, no step is to blame."""
    one = judge(max_consecutive=5)
    assert play(one, [FINE, SPIKE, SPIKE, SPIKE, FINE, SPIKE]) == ["step", "undo", "undo", "undo", "step", "undo"]
    assert (one.count, one.lr_scale) == (4, 0.25)
    assert [record["undone"] for record in one.records] == [1, 0, 0, 1]
    assert "there is no step to undo" in one.records[1]["message"]


def test_not_a_number_is_a_spike_from_the_first_step_on() -> None:
    one = judge(warmup_steps=100)
    assert play(one, [math.nan, FINE, math.inf, FINE]) == ["undo", "step", "undo", "step"]
    assert [(record["loss"], record["undone"]) for record in one.records] == [(None, 0), (None, 1)]
    json.dumps(one.records, allow_nan=False)


def test_patience_holds_the_snapshot_and_undoes_all_since() -> None:
    one = judge(patience=3)
    assert play(one, [FINE, SPIKE, SPIKE, SPIKE, FINE]) == ["step", "hold", "hold", "undo", "step"]
    assert one.records[0]["undone"] == 3
    assert one.lr_scale == 0.5
    assert play(one, [SPIKE, SPIKE, FINE]) == ["hold", "hold", "step"]


def test_a_step_without_a_loss_is_judged_with_the_next() -> None:
    one = judge()
    assert play(one, [FINE, None, SPIKE]) == ["step", "hold", "undo"]
    assert one.records[0]["undone"] == 2


def test_in_all_so_often() -> None:
    one = judge(max_undos=2)
    assert play(one, [FINE, SPIKE, FINE, SPIKE, FINE, SPIKE, math.nan]) == [
        *("step", "undo", "step", "undo", "step"),
        *("step", "step"),
    ]
    assert one.off
    assert one.count == 2
    assert len(one.records) == 3
    assert "max_undos=2 is reached: nothing is undone any more" in one.records[-1]["message"]


def test_in_a_row_so_often_then_it_is_the_new_level() -> None:
    one = judge(max_consecutive=2)
    actions = play(one, [FINE, SPIKE, SPIKE, SPIKE, SPIKE, SPIKE, 40 * SPIKE, FINE])
    assert actions == ["step", "undo", "undo", "step", "step", "step", "undo", "step"]
    assert "max_consecutive=2 is reached: this is the new level" in one.records[2]["message"]
    assert not one.off


@pytest.mark.parametrize("after_cap", ["stop", "raise"])
def test_other_ends(after_cap: Any) -> None:
    one = judge(max_undos=1, after_cap=after_cap)
    assert play(one, [FINE, SPIKE, FINE, SPIKE]) == ["step", "undo", "step", after_cap]
    assert one.records[-1]["undone"] == 1
    assert one.lr_scale == 0.5


def test_the_learning_rate_returns() -> None:
    one = judge(factor=0.25, recover_steps=4)
    factors = []
    for loss in [FINE, SPIKE, FINE, FINE, FINE, FINE, FINE, FINE]:
        if not one.judge(loss, 0).leaves_out:
            factors.append(one.stepped())
    assert factors[0] == 1.0
    assert factors[1:5] == [pytest.approx(math.sqrt(2))] * 4
    assert factors[5:] == [1.0, 1.0]
    assert one.lr_scale == 1.0


def test_it_goes_on_where_another_was() -> None:
    losses = [FINE, SPIKE, FINE, SPIKE, SPIKE, SPIKE, FINE, math.nan, FINE, SPIKE, FINE]
    options: dict[str, Any] = {"patience": 1, "max_consecutive": 2, "max_undos": 5, "recover_steps": 3}
    whole = judge(**options)
    expected = play(whole, losses)
    for stop in range(len(losses)):
        first, second = judge(**options), judge(**options)
        found = play(first, losses[:stop])
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        assert found + play(second, losses[stop:], stop) == expected
        assert second.state_dict() == whole.state_dict()


def test_a_larger_cap_is_one_to_go_on_with() -> None:
    old, same, larger = judge(max_undos=1), judge(max_undos=1), judge(max_undos=2)
    play(old, [FINE, SPIKE, FINE, SPIKE])
    for one, action in ((same, "step"), (larger, "undo")):
        one.load_state_dict(old.state_dict())
        assert play(one, [FINE, FINE, 99 * SPIKE])[-1] == action


def test_another_state_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not an UndoJudge's state: it has \['count'\]; valid: \['consecutive'"):
        judge().load_state_dict({"count": 1})


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "factor": ({"factor": 1.0}, ValueError, r"factor=1.0; valid: a number in \(0, 1\)"),
    "recover": ({"recover_steps": 0}, ValueError, "recover_steps=0; valid: a whole number >= 1"),
    "undos": ({"max_undos": 0}, ValueError, "max_undos=0"),
    "in a row": ({"max_consecutive": 2.0}, TypeError, r"max_consecutive=2.0"),
    "after": ({"after_cap": "pray"}, ValueError, "after_cap='pray'; valid: continue, stop, raise"),
    "snapshots": ({"snapshots": "disk"}, ValueError, "snapshots='disk'; valid: device, host"),
    "inherited": ({"threshold": -1.0}, ValueError, "UndoPolicy: threshold=-1.0"),
    "unknown": ({"treshold": 6.0}, TypeError, "undo has no option 'treshold'; valid: threshold, window"),
    "type": (6.0, TypeError, "undo=6.0; valid: False, True, an UndoPolicy, or a dict of threshold"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused_at_once(case: str) -> None:
    option, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        UndoPolicy.of(option)


def test_options() -> None:
    assert UndoPolicy.of(False) is None
    assert UndoPolicy.of(True) == UndoPolicy()
    assert UndoPolicy.of({}) == UndoPolicy()
    policy = UndoPolicy(factor=0.1)
    assert UndoPolicy.of(policy) is policy


# --- a training


class Net(nn.Module):
    """With batch norm, an average of weights that the optimizer does not have, and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
        self.average = nn.Parameter(torch.zeros(6, 4), requires_grad=False)
        self.frozen = nn.Parameter(torch.randn(1000), requires_grad=False)
        self.register_buffer("expanded", torch.zeros(1).expand(5))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.lerp_(self.layers[0].get_parameter("weight"), 0.1)
        return self.layers(x)


def training(
    batches: list[tuple[Tensor, Tensor]],
    *,
    halve_at: dict[int, float] | None = None,
    skip: AbstractSet[int] = frozenset(),
    **options: Any,
) -> tuple[Net, torch.optim.Optimizer, Undo | None]:
    """With ``halve_at``: without undo; its learning rates are multiplied at those batches, and some left out."""
    net = Net()
    optimizer = lightning_optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.02)
    schedule = Cosine(optimizer, total_steps=40, warmup_steps=3)
    one = judge(**options)
    undo = None if halve_at is not None else Undo(one, net, optimizer, schedules=lambda: [schedule])
    for number, (x, y) in enumerate(batches):
        if halve_at and number in halve_at:
            multiply_learning_rates(optimizer.param_groups, [schedule], halve_at[number])
        if number not in skip:
            if undo is not None:
                undo.begin_window()
            optimizer.zero_grad()
            loss = (net(x) - y).square().mean()
            decision = undo.judge(loss.item(), number) if undo is not None else None
            loss.backward()
            if undo is not None and decision is not None and decision.leaves_out:
                assert undo.revert(decision)
            else:
                if undo is not None:
                    undo.wait()
                optimizer.step()
                if undo is not None:
                    undo.stepped()
        schedule.step()
    return net, optimizer, undo


def data(poisoned: dict[int, float], count: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(count):
        x = torch.randn(8, 4, generator=generator)
        batches.append((x, x.sum(1, keepdim=True) + poisoned.get(number, 0.0)))
    return batches


def assert_same(found: Any, expected: Any) -> None:
    for (name, one), (_, other) in zip(found[0].state_dict().items(), expected[0].state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    one, other = found[1].state_dict(), expected[1].state_dict()
    assert one["param_groups"] == other["param_groups"]
    for key, state in other["state"].items():
        assert all(torch.equal(one["state"][key][slot], value) for slot, value in state.items())


@pytest.mark.parametrize("value", [1e4, math.nan, math.inf])
def test_a_poisoned_batch_leaves_no_trace_but_half_the_learning_rate(value: float) -> None:
    """Its loss says that the step before it is bad, too: both batches might as well not have been there."""
    found = training(data({11: value}), warmup_steps=5)
    expected = training(data({11: value}), halve_at={11: 0.5}, skip={10, 11})
    assert_same(found, expected)
    assert found[2] is not None
    found[2].release()


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.* before .*optimizer.step")
def test_even_at_the_first_batches() -> None:
    for at in (0, 1):
        found = training(data({at: math.nan}), warmup_steps=5)
        expected = training(data({at: math.nan}), halve_at={at: 0.5 if at else 1.0}, skip={0, at})
        # The average of weights is frozen, as far as one can tell before it moves for the first time.
        found[0].average.data, expected[0].average.data = torch.zeros(1), torch.zeros(1)
        assert_same(found, expected)


def test_several_in_a_row_and_later() -> None:
    poisoned = {8: 1e4, 9: 1e5, 14: -1e4}
    found = training(data(poisoned), warmup_steps=5)
    expected = training(data(poisoned), halve_at={8: 0.5, 14: 0.5}, skip={7, 8, 9, 13, 14})
    assert_same(found, expected)


def test_with_patience_all_suspects_are_undone() -> None:
    poisoned = {10: 1e4, 11: 1e4, 12: 1e4}
    found = training(data(poisoned), warmup_steps=5, patience=3)
    expected = training(data(poisoned), halve_at={12: 0.5}, skip={9, 10, 11, 12})
    assert_same(found, expected)


def test_after_the_cap_it_is_a_training_like_any_other() -> None:
    poisoned = {8: 1e4, 14: 1e4}
    found = training(data(poisoned), warmup_steps=5, max_undos=1)
    expected = training(data(poisoned), halve_at={8: 0.5}, skip={7, 8})
    assert_same(found, expected)
    assert found[2] is not None
    assert found[2].nbytes == 0


def test_memory() -> None:
    net, optimizer, undo = training(data({}))
    assert undo is not None
    size = snapshot_bytes(net, optimizer)
    average, expanded = 2 * net.average.nbytes, 2 * net.get_buffer("expanded").nbytes
    assert undo.nbytes == sum(size.values()) + average - expanded
    undo.release()
    assert undo.nbytes == 0


def test_too_little_memory_is_an_error_with_all_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = torch.empty_like

    def none_left(like: Tensor, *, device: Any = None, **options: Any) -> Tensor:
        if device is None:
            raise RuntimeError("no memory")
        return stock(like, device=device, **options)

    net = nn.Linear(512, 512, bias=False)
    undo = Undo(judge(), net, optimizer := lightning_optim.AdamW(net.parameters()))
    monkeypatch.setattr(torch, "empty_like", none_left)
    with pytest.raises(MemoryError, match=r"3.0 MiB = 1.0 of weights \+ 2.0 of state \+ 0.0 of buffers.*'host'"):
        undo.judge(FINE, 0)
    del optimizer


def test_more_tensors_are_put_back() -> None:
    net, master = nn.Linear(2, 2), torch.ones(3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    undo = Undo(judge(), net, optimizer, more=lambda: [master])
    for loss in (FINE, SPIKE):
        undo.begin_window()
        decision = undo.judge(loss, 0)
        if decision.leaves_out:
            undo.revert(decision)
        else:
            undo.wait()
            master.zero_()
            undo.stepped()
    assert master.tolist() == [1, 1, 1]
    undo.release()


def test_which_optimizers_can_be_undone() -> None:
    net = nn.Linear(3, 3)
    for info in OPTIMIZERS.values():
        assert why_not_undone(info.create(net.named_parameters())) is None
    lbfgs = CLOSURE_OPTIMIZERS["lbfgs"].create(net.parameters())
    assert "which keeps state elsewhere" in str(why_not_undone(lbfgs))
    sam = SAM(net.parameters(), lightning_optim.AdamW)
    assert why_not_undone(sam) is None
