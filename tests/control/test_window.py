"""A window that is evaluated again: the same noise, the same buffers, and nothing left behind."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_optim.control.replay.window import ModuleState, RandomStates, Window, muted


def noise() -> tuple[Any, ...]:
    return (
        random.gauss(0, 1),
        np.random.rand(),
        torch.rand(2).tolist(),
        torch.nn.functional.dropout(torch.ones(8)).tolist(),
    )


def test_all_generators() -> None:
    for _ in range(2):  # also from the middle of a sequence
        states = RandomStates()
        first = noise()
        assert noise() != first
        states.put_back()
        assert noise() == first
    states = RandomStates()
    torch.manual_seed(0)
    random.seed(0)
    states.put_back()
    after = noise()
    states.put_back()
    assert noise() == after


class Counting(nn.Module):
    """Buffers of all kinds: changed in place, replaced, absent, and constant."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.untracked = nn.BatchNorm1d(3, track_running_stats=False)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2), persistent=False)
        self.register_buffer("absent", None)
        self.constant = nn.Module()
        self.constant.register_buffer("table", torch.arange(4.0))
        self.count: Tensor
        self.replaced: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.replaced = self.replaced + x.mean().detach()
        return self.untracked(self.norm(x)) * self.count + self.replaced.sum()


def contents(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_buffers_are_put_back() -> None:
    model = Counting()
    model(torch.randn(4, 3))
    before, held = contents(model), dict(model.named_buffers())
    state = ModuleState(model)
    for _ in range(2):
        model(torch.randn(4, 3))
        assert not same(contents(model), before)
        state.put_back()
        assert same(contents(model), before)
        # The very tensors, which others may hold.
        assert all(buffer is held[name] for name, buffer in model.named_buffers())


def test_copies_are_shared_where_nothing_has_changed() -> None:
    """The averages of a batch norm change past autograd's version counters."""
    model = Counting()
    first = ModuleState(model)
    second = ModuleState(model, first)
    assert all(second._parts[part] is first._parts[part] for part in first._parts)
    model(torch.randn(4, 3))
    third = ModuleState(model, second)
    assert third._parts[model.constant] is first._parts[model.constant]
    assert third._parts[model.norm] is not first._parts[model.norm]
    assert third._parts[model] is not first._parts[model]
    model(torch.randn(4, 3))
    for state, steps in ((first, 0), (third, 1), (second, 0)):
        state.put_back()
        assert model.count.item() == model.norm.num_batches_tracked.item() == steps  # type: ignore[union-attr]
        assert bool(model.norm.running_mean.abs().sum() > 0) == (steps > 0)  # type: ignore[union-attr]


def test_metrics_are_put_back() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    model: Any = nn.Module()
    model.mean, model.cat = torchmetrics.MeanMetric(), torchmetrics.CatMetric()
    model.mean.update(1.0)
    model.cat.update(1.0)
    model.cat.compute()
    plain, state = ModuleState(model), ModuleState(model, metrics=True)
    for one in (plain, state):
        model.mean.update(3.0)
        model.cat.update(3.0)
        one.put_back()
        assert (model.mean.compute() == 1.0) == (one is state)
        assert (model.cat.compute().numel() == 1) == (one is state)
    assert model.cat.update_count == 1
    model.cat.update(5.0)
    assert model.cat.compute().tolist() == [1.0, 5.0]


class Noisy(Counting):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.layer = nn.Linear(3, 1)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.count.item())
        return self.layer(self.drop(super().forward(x))).square().mean() + random.gauss(0, 1)


@pytest.fixture
def model() -> Noisy:
    torch.manual_seed(0)
    return Noisy()


def test_a_window(model: Noisy) -> None:
    """At the same weights a replay gives the same bits, however often; and then noise goes on as if it had not been."""
    window = Window(model, lambda loss: None if loss is None else loss / 3)
    for step in range(3):
        window.run(partial(model, torch.randn(4, 3)))
        torch.rand(5 + step)  # what others draw in between
    assert len(window) == 3
    assert not window.loss.requires_grad
    after, states = contents(model), RandomStates()
    expected = noise()
    states.put_back()
    for _ in range(2):
        grads: list[Tensor] = []

        def backward(loss: Tensor, grads: list[Tensor] = grads) -> None:
            grads += torch.autograd.grad(loss, [model.layer.weight])

        assert torch.equal(window.replay(backward), window.loss)
        assert len(grads) == 3
        assert same(contents(model), after)
    assert model.seen == [0, 1, 2] * 3
    assert noise() == expected
    with torch.no_grad():
        model.layer.weight.add_(1.0)
    assert not torch.equal(window.replay(lambda loss: None), window.loss)
    window.clear()
    assert len(window) == 0
    with pytest.raises(ValueError, match="nothing to replay"):
        window.replay(lambda loss: None)


def test_all_but_the_last_are_in_between(model: Noisy) -> None:
    entered: list[str] = []

    @contextmanager
    def between() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    window = Window(model, lambda loss: loss)
    for _ in range(3):
        window.run(partial(model, torch.randn(4, 3)))
    window.replay(lambda loss: entered.append("backward"), between)
    assert entered == ["in", "backward", "out"] * 2 + ["backward"]


def test_evaluations_without_a_loss_are_not_made_again(model: Noisy) -> None:
    window = Window(model, lambda loss: loss)
    assert window.run(lambda: None) is None
    window.run(partial(model, torch.randn(4, 3)))
    assert len(window) == 1
    answers = iter([torch.ones(()), None])
    window.run(lambda: next(answers))
    with pytest.raises(RuntimeError, match=r"batch 2 of 2 had a loss and, evaluated again at other weights, has none"):
        window.replay(lambda loss: None)


def test_an_error_leaves_nothing_behind(model: Noisy) -> None:
    window = Window(model, lambda loss: loss)
    for _ in range(2):
        window.run(partial(model, torch.randn(4, 3)))
    after, states = contents(model), RandomStates()
    expected = noise()
    states.put_back()

    def fail(loss: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        window.replay(fail)
    assert same(contents(model), after)
    assert noise() == expected


def test_muting_what_an_instance_has_of_its_own() -> None:
    class Talking:
        def __init__(self) -> None:
            self.said: list[str] = []

        def say(self, word: str) -> None:
            self.said.append(word)

    talking = Talking()
    own = talking.say
    talking.say = lambda word: own(word.upper())  # type: ignore[method-assign]
    replaced = talking.say
    with contextlib.suppress(ZeroDivisionError), muted(talking, "say"):
        talking.say("no")
        raise ZeroDivisionError
    assert talking.say is replaced
    talking.say("yes")
    assert talking.said == ["YES"]


def test_rescaling_hides_nothing_but_itself() -> None:
    """Gradients that are multiplied as a replay multiplies losses need no repeating; those that were dropped do."""
    for drops in (False, True):
        weight = nn.Parameter(torch.tensor(1.0))
        module = nn.Module()
        module.weight = weight
        window = Window(module, lambda output: output)
        for factor in (1.0, 2.0):
            window.run(partial(torch.mul, weight, factor))
            window.before_backward()
            (weight * factor).backward()
            window.after_backward()
            if factor == 1.0:
                if drops:
                    assert weight.grad is not None
                    weight.grad.zero_()
                with window.rescaling(), torch.no_grad():
                    assert weight.grad is not None
                    weight.grad.mul_(3)
        window.end()
        assert window.touched == drops
        weight.grad = None
        window.replay(lambda loss: loss.backward())
        assert weight.grad is not None
        assert weight.grad.item() == (2.0 if drops else 3.0)
