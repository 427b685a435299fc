"""torch's interface: groups, tensors, resuming, ``last_epoch``, and schedules inside of torch's own."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    SequentialLR,
)

from lightning_optim.schedulers import Cosine, Linear, Schedule

from .common import SCHEDULES, Make, advance, lrs_of, sgd


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
