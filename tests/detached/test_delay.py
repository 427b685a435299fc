"""``delay_one_step``: the update of one step runs beside the next forward pass, which therefore lacks it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from foreign import Foreign
from torch import Tensor, nn

from lightning_optim.offload import Detached, DetachedOptions

from .common import (
    PAIRS,
    Plan,
    assert_close_to,
    bits,
    detached,
    known_warnings,
    link,
    loss_of,
    reference,
    run,
    small,
    weights,
)

pytestmark = known_warnings

DELAYED = small(delay_one_step=True)


@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize("overlap", [True, False])
def test_updates_come_one_step_late(overlap: bool, poisoned: bool) -> None:
    """With gradients that depend on the weights: of step n, they are those at the weights after step n - 2."""
    net, twin = (nn.Linear(4, 3) for _ in range(2))
    twin.load_state_dict(net.state_dict())
    masters = [nn.Parameter(p.detach().clone()) for p in twin.parameters()]
    stock = torch.optim.AdamW(masters, lr=0.1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    transport = link() if poisoned else None
    with detached(optimizer, DELAYED, overlap=overlap, transport=transport) as pipeline:
        for step in range(6):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            for p, q in zip(net.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
            for module in (net, twin):
                module(x).square().mean().backward()
            lr = 0.1 / (1 + step)
            optimizer.param_groups[0]["lr"] = stock.param_groups[0]["lr"] = lr
            pipeline.step(max_grad_norm=0.5)
            optimizer.param_groups[0]["lr"] = 99.0  # a schedule moves on while the update goes on
            pipeline.zero_grad()
            with torch.no_grad():  # the update of the step before arrives
                for q, master in zip(twin.parameters(), masters, strict=True):
                    q.copy_(master)
                    assert q.grad is not None
                    master.grad, q.grad = q.grad, None
            nn.utils.clip_grad_norm_(masters, 0.5)
            stock.step()
        pipeline.publish()
    for p, master in zip(net.parameters(), masters, strict=True):
        torch.testing.assert_close(p, master, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("plan", [Plan(clip=20.0), Plan(micro=3), Plan(absent=lambda step: (step % 6, 5))])
def test_gradients_that_do_not_depend_on_weights_give_the_same_in_the_end(plan: Plan) -> None:
    ours, theirs = PAIRS["torch AdamW"]
    found = run(weights(), ours, plan, DELAYED)
    assert_close_to(found, reference(weights(), theirs, plan))


def test_zero_grad_does_not_wait_for_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    params, go = weights(), threading.Event()
    with detached(PAIRS["torch AdamW"][0](params), DELAYED) as pipeline:
        update = pipeline._host._update
        monkeypatch.setattr(pipeline._host, "_update", lambda *args: (go.wait(), update(*args)))
        before = bits(params[0])
        loss_of(params, 0).backward()
        pipeline.step()
        pipeline.zero_grad()
        loss = loss_of(params, 1)  # a forward pass beside it
        assert torch.equal(bits(params[0]), before)
        go.set()
        loss.backward()
        pipeline.step()
        assert not torch.equal(bits(params[0]), before)


def test_weights_changed_meanwhile_are_what_was_wanted_last() -> None:
    params = weights()
    with detached(PAIRS["torch SGD"][0](params), DELAYED) as pipeline:
        loss_of(params, 0).backward()
        pipeline.step()
        with torch.no_grad():
            params[0].fill_(3.0)
        old = params[1].detach().clone()
        pipeline.publish()
        assert (params[0] == 3).all()
        assert (pipeline.masters()[params[0]] == 3).all()
        assert not torch.equal(params[1], old)


def test_masters_and_weights_are_those_after_the_update() -> None:
    params = weights()
    with detached(PAIRS["torch SGD"][0](params), DELAYED) as pipeline:
        loss_of(params, 0).backward()
        pipeline.step()
        masters = pipeline.masters()
        assert all(torch.equal(p, masters[p].bfloat16()) for p in params)


def test_an_update_that_fails_surfaces_in_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights()
    with detached(PAIRS["torch SGD"][0](params), DELAYED) as pipeline:

        def fail(*args: Any) -> Tensor:
            raise MemoryError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(pipeline._host, "_update", fail)
            loss_of(params, 0).backward()
            pipeline.step()
            with pytest.raises(MemoryError, match="no memory"):
                pipeline.publish()
        pipeline.zero_grad()
        old = params[0].detach().clone()
        loss_of(params, 1).backward()
        pipeline.step()
        pipeline.publish()
        assert not torch.equal(params[0], old)


def test_an_optimizer_that_runs_its_own_step_cannot_be_late() -> None:
    with pytest.raises(ValueError, match=r"delay_one_step=True with Foreign, which runs its own step .*valid: delay_"):
        Detached(Foreign(weights()), DetachedOptions(delay_one_step=True))
