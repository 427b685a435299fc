"""``LossScaler`` ends a run that skips every step, with the name of the gradient that overflowed first."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim.control import overflow, skipped_steps
from lightning_optim.control.loss_scale import LossScaler, TooManySkippedStepsError

from .scaling import ALL, KnownLate, equal, network, overflow_in, repeat, train

pytestmark = pytest.mark.usefixtures("one_thread")


class Crossed(nn.Module):
    """Its layers are registered in another order than they are run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last, self.first, self.middle = nn.Linear(4, 1), nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)).tanh())


@pytest.fixture(params=[False, True], ids=["at once", "one step late"])
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the host learns that a step was skipped."""
    if request.param:
        monkeypatch.setattr(skipped_steps, "LateReader", KnownLate)


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_it_gives_up_at_that_very_step(most: int, late: None) -> None:
    """Whatever the host has seen before; a step in between that was made begins a new row."""
    good = 3 if most > 3 else 0
    scaler = LossScaler("cpu", max_skipped_steps=most)
    weights: list[list[Tensor]] = []
    with pytest.raises(TooManySkippedStepsError, match=f"LossScaler: {most} steps in a row were skipped"):
        weights.extend(now for _, now in train(scaler, 20, ALL - {good}))
    assert len(weights) == good + most
    assert equal(weights[good], weights[-1])  # the error has changed none


def test_it_names_the_gradient_that_was_first_in_the_backward_pass(late: None) -> None:
    """Here of a layer that the module has before the others."""
    net = Crossed()
    hooks = [overflow_in(p, *range(1, 9)) for p in (net.middle.bias, net.last.weight, net.first.weight)]
    scaler = LossScaler("cpu", init_scale=16.0, max_skipped_steps=5, module=net)
    seen: list[int] = []

    def loss_of(step: int) -> Tensor:
        seen.append(step)
        for at in hooks:
            at(step)
        loss: Tensor = net(torch.ones(2, 3)).mean()
        return loss

    with pytest.raises(TooManySkippedStepsError) as caught:
        repeat(scaler, net, loss_of, 9, window=2)
    assert str(caught.value) == (
        "LossScaler: 5 steps in a row were skipped, since gradients were inf or NaN, the last one with a scale of 1. "
        "The first such gradient in the backward pass was that of last.weight; 3 of 6 parameters had one. "
        "What to do: valid: a smaller loss, min_scale=None, or bfloat16 (precision='bf16-mixed')"
    )
    assert seen[-1] == 5
    assert not any(p._backward_hooks and len(p._backward_hooks) > 1 for p in net.parameters())  # ours are removed


def test_a_gradient_that_spreads_is_told_from_where_it_comes() -> None:
    """From ``last`` on all are infinite or NaN; by the order of the module the first would be ``middle``'s."""
    net = Crossed()

    class Exploding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 1e38 * 1e38

    explode: Any = Exploding.apply
    scaler = LossScaler("cpu", max_skipped_steps=3, module=net)
    with pytest.raises(TooManySkippedStepsError, match=r"that of last\.\w+; 6 of 6 parameters had one"):
        repeat(scaler, net, lambda _: explode(net(torch.ones(2, 3))).mean(), 3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("loss", "The loss itself was inf or NaN. .*What to do: no scale can mend that: look at the data"),
        ("weight", "Weights are inf or NaN as well, such as 2.weight. What to do: no scale can mend that"),
    ],
)
def test_what_no_scale_can_mend_is_said(spoil: str, message: str) -> None:
    net = network()
    scaler = LossScaler("cpu", max_skipped_steps=4, module=net)
    if spoil == "weight":
        list(net.parameters())[2].data[0, 0] = math.inf
    with pytest.raises(TooManySkippedStepsError, match=message):
        list(train(scaler, 8, ALL if spoil == "loss" else set(), net))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dynamic": False}, "valid: dynamic=True, an init_scale below 8, or bfloat16"),
        ({"min_scale": None}, "valid: a larger max_skipped_steps, a smaller init_scale, or bfloat16"),
        ({}, "with a scale of 2. .*valid: a larger max_skipped_steps"),
    ],
)
def test_it_says_what_to_do(settings: dict[str, Any], message: str) -> None:
    net = network()
    overflow_in(next(net.parameters()), 0)
    scaler = LossScaler("cpu", init_scale=8.0, max_skipped_steps=3, **settings)
    with pytest.raises(TooManySkippedStepsError, match=message):
        list(train(scaler, 8, set(), net))


@pytest.mark.parametrize("names", ["module", "optimizer", None])
def test_where_names_come_from(names: str | None) -> None:
    inner = network()
    net = nn.Sequential(inner)
    params = list(inner.parameters())
    overflow_in(params[2], 0)
    groups: Any = [{"params": params[:2]}, {"params": params[2:4]}]
    optimizer = torch.optim.SGD(net.named_parameters() if names == "optimizer" else groups, lr=0.1)
    scaler = LossScaler("cpu", max_skipped_steps=1, module=net if names == "module" else None)
    scaler.scale(net(torch.ones(2, 3)).mean()).backward()
    wanted = r"parameter 0 \(shape \(2, 4\)\) of param group 1" if names is None else r"0\.2\.weight"
    with pytest.raises(TooManySkippedStepsError, match=f"was that of {wanted}; 1 of"):
        scaler.step(optimizer)


def test_who_catches_the_error_can_go_on() -> None:
    scaler = LossScaler("cpu", init_scale=2.0, max_skipped_steps=2)
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    raised = []
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(2, 3)).mean() * (math.inf if step < 5 else 1.0)).backward()
        try:
            scaler.step(optimizer)
            scaler.update()
        except TooManySkippedStepsError:
            raised.append(step)
    assert raised == [1, 3]
    assert scaler.state_dict()["consecutive_skips"] == [0]
    assert scaler.state_dict()["skipped_steps"] == [5]


def test_sparse_gradients() -> None:
    net = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1))
    scaler = LossScaler("cpu", max_skipped_steps=3, module=net)
    with pytest.raises(TooManySkippedStepsError, match=r"that of 1\.\w+; 3 of 3 parameters had one"):
        repeat(scaler, net, lambda _: net(torch.tensor([1, 2])).mean() * math.nan, 3)


@pytest.mark.parametrize("apart", [False, True])
def test_each_optimizer_has_its_own_row(apart: bool) -> None:
    """One that is fine does not hide that another is never stepped; updates after each, or after both."""
    nets = [network(), network()]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in nets]
    scaler = LossScaler("cpu", max_skipped_steps=4, module=nets[1])

    def step(which: int) -> None:
        optimizers[which].zero_grad()
        scaler.scale(nets[which](torch.ones(2, 3)).mean() * (math.nan if which else 1.0)).backward()
        scaler.step(optimizers[which])
        if apart or which:
            scaler.update()

    for _ in range(3):
        step(0)
        step(1)
    assert [scaler.step_was_skipped(optimizer) for optimizer in optimizers] == [False, True]
    assert scaler.state_dict()["consecutive_skips"] == [0, 3]
    step(0)
    with pytest.raises(TooManySkippedStepsError, match="that of 3"):
        step(1)


def test_a_gradient_that_never_was_is_no_overflow() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)], lr=0.1)
    found = overflow.find_overflow(optimizer, None, overflow.BackwardWatch(overflow.parameters_of(optimizer)))
    assert (found.parameters, found.weights, found.is_beyond_scaling) == ([], [], False)
    assert str(found) == "No gradient that this process still has was such a one; the errors of others may say more."
