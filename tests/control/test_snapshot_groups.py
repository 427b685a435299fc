"""Groups that come, go or change places between a snapshot and its restoring."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_optim
from lightning_optim.control.rollback.step_snapshot import StepSnapshot
from lightning_optim.control.rollback.undo import Undo, UndoJudge, UndoPolicy


def make() -> tuple[list[nn.Parameter], lightning_optim.AdamW]:
    params = [nn.Parameter(torch.full((2,), float(i))) for i in range(3)]
    return params, lightning_optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(params)], lr=0.1
    )


def step(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_groups_that_change_places_keep_their_options() -> None:
    params, optimizer = make()
    step(params, optimizer)
    before = [p.detach().clone() for p in params]
    snapshot = StepSnapshot(optimizer)
    snapshot.begin()
    snapshot.wait()
    step(params, optimizer)
    optimizer.param_groups[1]["weight_decay"] = 7.0  # as a schedule of it might
    optimizer.param_groups.reverse()
    snapshot.restore()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.1, 0.0]
    assert [group["params"][0] is p for group, p in zip(optimizer.param_groups, params[::-1], strict=True)] == [
        True
    ] * 3
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    assert all(optimizer.state[p]["step"].item() == 1 for p in params)


def test_a_group_that_was_taken_out_changes_no_other() -> None:
    params, optimizer = make()
    snapshot = StepSnapshot(optimizer)
    snapshot.begin()
    snapshot.wait()
    step(params, optimizer)
    del optimizer.param_groups[0]
    optimizer.add_param_group({"params": [params[0]], "weight_decay": 0.5})
    snapshot.restore()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.2, 0.5]
    assert [p.tolist() for p in params] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


def test_groups_that_were_loaded_since() -> None:
    params, optimizer = make()
    snapshot = StepSnapshot(optimizer)
    snapshot.begin()
    snapshot.wait()
    step(params, optimizer)
    state = optimizer.state_dict()
    state["param_groups"][1]["weight_decay"] = 7.0
    optimizer.load_state_dict(state)
    snapshot.restore()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, pytest.approx(0.1), 0.2]


@pytest.mark.parametrize("how", ["added", "unfrozen"])
def test_a_layer_that_is_unfrozen_while_a_spike_may_last(how: str) -> None:
    """Several steps are undone together; the later ones have moved what had not been there, or not been trained."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for p in module[0].parameters():
        p.requires_grad_(False)
    trained = module.parameters() if how == "unfrozen" else module[1].parameters()
    optimizer = lightning_optim.AdamW(trained, lr=0.1)
    undo = Undo(UndoJudge(UndoPolicy(warmup_steps=1, window=2, min_ratio=1.1, patience=3)), module, optimizer)
    before = [p.detach().clone() for p in module.parameters()]
    for number, loss in enumerate([1.0, 1e3, 1e3, 1e3]):
        undo.begin_window()
        if number == 2:
            module.requires_grad_(True)
            if how == "added":
                optimizer.add_param_group({"params": list(module[0].parameters())})
        decision = undo.judge(loss, number)
        if decision.leaves_out:
            assert decision.undone == 3
            undo.revert(decision)
            break
        module(torch.ones(1, 2)).sum().backward()
        undo.wait()
        optimizer.step()
        undo.stepped()
    else:
        pytest.fail("there was no spike")
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
    assert not optimizer.state
    assert [group["lr"] for group in optimizer.param_groups] == [0.05] * len(optimizer.param_groups)
    undo.release()


def test_views_of_what_memory_does_not_hold() -> None:
    """Weights that are lazily negated or conjugated, and such that share memory."""
    memory = torch.arange(6.0)
    params = [
        nn.Parameter(torch._neg_view(torch.ones(3))),
        nn.Parameter(torch.view_as_complex(torch.ones(2, 2)).conj()),
        nn.Parameter(memory[:4]),
        nn.Parameter(memory[2:]),
    ]
    before = [p.detach().clone() for p in params]
    optimizer = torch.optim.SGD(params, lr=0.1)
    snapshot = StepSnapshot(optimizer)
    snapshot.begin()
    snapshot.wait()
    with torch.no_grad():
        for p in params:
            p.mul_(2).add_(1)
    snapshot.restore()
    assert all(torch.equal(p.resolve_conj().resolve_neg(), old) for p, old in zip(params, before, strict=True))
