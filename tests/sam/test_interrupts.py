"""A step that is interrupted at any call leaves the weights where they were or are to go; the next step is right."""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from interrupting import Interrupt, is_one_of, ours

import lightning_optim
from lightning_optim.optimizers.sam import SAM

from .common import closure_of, network, train, weights


@pytest.mark.parametrize("adaptive", [False, True])
def test_at_every_call(adaptive: bool, one_thread: None) -> None:
    """Those of this package, and into torch from it."""
    make = partial(SAM, base=partial(lightning_optim.SGD, lr=0.05, engine="eager"), rho=0.5, adaptive=adaptive)
    net = network()
    train(net, make(net.parameters()), range(1))
    after_one = weights(net)
    train(net, make(net.parameters()), range(1, 2))
    after_two = weights(net)
    interrupts = 0
    for number in count(int(adaptive), 11):  # a sample, in which no loop is hit at one place only
        net = network()
        before, optimizer = weights(net), make(net.parameters())
        optimizer.zero_grad()
        if not Interrupt(number, ours)(lambda: optimizer.step(closure_of(optimizer, net, 0))):  # noqa: B023
            break
        interrupts += 1
        now = weights(net)
        assert is_one_of(now, before, after_one), f"call {number}"
        with torch.no_grad():
            for p, value in zip(net.parameters(), after_one, strict=True):
                p.copy_(value)
        train(net, optimizer, range(1, 2))
        assert all(torch.equal(a, b) for a, b in zip(weights(net), after_two, strict=True)), f"call {number}"
    assert interrupts > 20


@pytest.mark.parametrize("wait", ["perturb", "closure", "restore"])
def test_the_users_own_passes(wait: str) -> None:
    """After an error between `perturb` and `restore`, `abandon` puts everything back, or `restore` does."""
    net = network()
    optimizer = SAM(net.parameters(), partial(lightning_optim.SGD, lr=0.05), rho=0.5)
    before = weights(net)
    closure_of(optimizer, net, 0)()
    interrupted = 0
    for number in count():
        if wait == "restore":
            optimizer.perturb()
        done = Interrupt(number, ours)(optimizer.restore if wait == "restore" else optimizer.perturb)
        interrupted += done
        optimizer.abandon()
        assert all(torch.equal(a, b) for a, b in zip(weights(net), before, strict=True))
        with pytest.raises(RuntimeError, match="without a closure"):
            optimizer.step()
        if not done:
            break
    assert interrupted > 3


def test_an_error_of_the_closure() -> None:
    net = network()
    optimizer = SAM(net.parameters(), partial(lightning_optim.SGD, lr=0.05), rho=0.5)
    before, calls = weights(net), 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            assert not torch.equal(before[0], next(net.parameters()))
            raise ZeroDivisionError
        return closure_of(optimizer, net, 0)()

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(weights(net), before, strict=True))


def test_gradients_that_the_closure_drops() -> None:
    """After the first evaluation there is no second one; after the second, no step. No backward at all is an error."""
    net = network()
    optimizer = SAM(net.parameters(), partial(lightning_optim.SGD, lr=0.05), rho=0.5)
    before = weights(net)
    for dropped in (1, 2):
        calls = 0

        def closure(dropped: int = dropped) -> Any:
            nonlocal calls
            calls += 1
            loss = closure_of(optimizer, net, 0)()
            if calls == dropped:
                optimizer.zero_grad()
            return loss

        optimizer.step(closure)
        assert calls == dropped
        assert all(torch.equal(a, b) for a, b in zip(weights(net), before, strict=True))
    closure_of(optimizer, net, 0)()
    with pytest.raises(RuntimeError, match="computed no gradients when it was called a second time"):
        optimizer.step(lambda: torch.zeros(()))
