"""``LossScaling`` in whole trainings: against loops that are written out, and where Lightning's own goes wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from strategies.common import (
    CLOSE,
    EXACT,
    OPTIMIZERS,
    Model,
    assert_same_steps,
    dataset,
    fit,
    network,
    scaled,
)
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, OneCycleLR, SequentialLR

import lightning_optim
from lightning_optim.callbacks import LossScaling
from lightning_optim.control.loss_scale import TooManySkippedStepsError

from .scaling import (
    OVERFLOWS,
    STRATEGIES,
    GradScaler,
    Hook,
    Manual,
    Noted,
    Scaled,
    by_hand,
    half,
    marks,
    states,
    train,
)

pytestmark = marks

#: One that unscales in a step of its own, as torch has it.
MAKES = OPTIMIZERS | {"fused": partial(torch.optim.AdamW, lr=0.05, fused=True)}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["ours", "torch AdamW", "foreign"])
@pytest.mark.parametrize("options", [{}, {"clip": 0.5}, {"clip": 0.5, "accumulate": 2}], ids=str)
def test_as_a_loop_that_is_written_out(options: dict[str, Any], name: str, strategy: str) -> None:
    expected = by_hand(OPTIMIZERS[name], **options)
    flags = {"gradient_clip_val": options.get("clip"), "accumulate_grad_batches": options.get("accumulate", 1)}
    run, found = train(Scaled(OPTIMIZERS[name]), strategy, **flags)
    assert_same_steps(found, expected, **(EXACT if strategy == "auto" else CLOSE))
    assert states(run)["scale"] == expected.scales[-1]
    assert len(set(expected.scales)) > 1


@pytest.mark.parametrize(("name", "strategy"), [("fused", "auto"), ("fused", "in_graph"), ("ours", "optim_auto")])
def test_optimizers_that_unscale_themselves_and_placement(name: str, strategy: str) -> None:
    _, found = train(Scaled(MAKES[name]), strategy)
    assert_same_steps(found, by_hand(MAKES[name]))


def manually_by_hand(make: Any) -> Noted:
    net, noted = network(), Noted()
    optimizers = [make(net[at].parameters()) for at in (0, 3)]
    schedules = [LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in optimizers]
    scaler = GradScaler("cpu", init_scale=256.0, growth_interval=2000)
    x, y = dataset().tensors
    for batch in range(8):
        part = slice(2 * batch, 2 * batch + 2)
        for which, optimizer in ((1, optimizers[1]), (0, optimizers[0])):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                loss = nn.functional.mse_loss(net(x[part]).to(y.dtype), y[part])
            scaler.scale(loss * 1e30 if which and batch in OVERFLOWS else loss).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= before:
                schedules[which].step()
        noted.weights.append({f"net.{name}": p.detach().clone() for name, p in net.named_parameters()})
        noted.lrs.append(optimizers[0].param_groups[0]["lr"])
    return noted


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_manual_optimization(strategy: str) -> None:
    callback = LossScaling(init_scale=256.0)
    run, found = train(Manual(), strategy, callback)
    assert_same_steps(found, manually_by_hand(OPTIMIZERS["torch AdamW"]), **(EXACT if strategy == "auto" else CLOSE))
    assert callback.scaler is not None
    assert callback.scaler.state_dict()["skipped_steps"] == [0, 3]
    assert run.lr_scheduler_configs[1].scheduler.last_epoch == 5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_optimizer_of_two_that_is_never_stepped(strategy: str) -> None:
    model = Manual()
    model.overflows = set(range(8))
    callback = LossScaling(init_scale=256.0, max_skipped_steps=5)
    with pytest.raises(TooManySkippedStepsError, match=r"5 steps in a row .* that of net\.3\.\w+; 2 of 2 parameters"):
        train(model, strategy, callback)
    assert model.trainer.fit_loop.epoch_loop.batch_idx == 4


# -- schedules ------------------------------------------------------------------------------------------------------


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=20),
    "restarts": lambda optimizer: CosineAnnealingWarmRestarts(optimizer, 3),
    "sequential": lambda optimizer: SequentialLR(
        optimizer, [LambdaLR(optimizer, lambda step: step + 1), LambdaLR(optimizer, lambda step: 9 / (step + 1))], [2]
    ),
    "ours": lambda optimizer: lightning_optim.schedulers.Linear(optimizer, total_steps=20),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_schedule_waits_for_steps_that_were_skipped(schedule: str) -> None:
    """Lightning's own strategies advance it (PL#5558)."""

    class Scheduled(Scaled):
        def configure_optimizers(self) -> Any:
            optimizer = self.make(self.parameters())
            config = {"interval": "step", "scheduler": SCHEDULES[schedule](optimizer)}
            return {"optimizer": optimizer, "lr_scheduler": config}

    steps = SCHEDULES[schedule](torch.optim.AdamW(network().parameters(), lr=0.05))
    rates = [steps.get_last_lr()[0]]
    for _ in range(8):
        steps.optimizer.step()
        steps.step()
        rates.append(steps.get_last_lr()[0])
    done = [1, 2, 2, 2, 3, 4, 4, 5]
    for strategy in STRATEGIES:
        run, found = train(Scheduled(), strategy, LossScaling(init_scale=256.0))
        assert found.lrs == [rates[step] for step in done]
        assert run.global_step == 8
    _, stock = fit(Scheduled(), "auto", plugins=[half(GradScaler("cpu", 256.0))])
    assert stock.lrs == rates[1:]


# -- gradients and hooks --------------------------------------------------------------------------------------------


def clamp(net: nn.Module) -> None:
    for p in net.parameters():
        if p.grad is not None:
            p.grad.clamp_(-0.5, 0.5)


def replace(net: nn.Module) -> None:
    for p in net.parameters():
        if p.grad is not None:
            p.grad = p.grad * 0.5


def drop_one(net: nn.Module) -> None:
    next(net.parameters()).grad = None


HOOKS: dict[str, Hook] = {"changed in place": clamp, "replaced": replace, "dropped": drop_one}


class Hooked(Scaled):
    """Changes gradients in one way or another."""

    def __init__(self, make: Any, hook: str, change: Hook) -> None:
        super().__init__(make)
        self.hook, self.change = hook, change

    def on_after_backward(self) -> None:
        if self.hook == "on_after_backward":
            self.change(self.net)


class HookedBeforeTheStep(Hooked):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.change(self.net)


class HookedInTheStep(Hooked):
    def configure_optimizers(self) -> Any:
        config = super().configure_optimizers()
        config["optimizer"].register_step_pre_hook(lambda *_: self.change(self.net))
        return config


@pytest.mark.parametrize(
    ("strategy", "name"), [("auto", "torch AdamW"), ("in_graph", "ours"), ("in_graph", "foreign"), ("detached", "ours")]
)
@pytest.mark.parametrize("change", HOOKS)
@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_optimizer_step"])
def test_what_hooks_do_to_gradients_is_not_lost(hook: str, name: str, change: str, strategy: str) -> None:
    cls = Hooked if hook == "on_after_backward" else HookedBeforeTheStep
    _, found = train(cls(OPTIMIZERS[name], hook, HOOKS[change]), strategy, gradient_clip_val=0.4)
    after = hook == "on_after_backward"
    expected = by_hand(
        OPTIMIZERS[name],
        0.4,
        after_backward=HOOKS[change] if after else None,
        before_step=None if after else HOOKS[change],
    )
    assert_same_steps(found, expected, **(EXACT if strategy == "auto" else CLOSE))


@pytest.mark.parametrize("strategy", ["in_graph", "detached"])
@pytest.mark.parametrize("change", HOOKS)
@pytest.mark.parametrize(("name", "clip"), [("ours", None), ("torch AdamW", 0.4)])
def test_the_optimizers_own_hooks(name: str, clip: float | None, change: str, strategy: str) -> None:
    """They see gradients that are unscaled and clipped, as under Lightning's own strategies."""
    runs = [
        train(HookedInTheStep(OPTIMIZERS[name], "", HOOKS[change]), one, gradient_clip_val=clip)[1]
        for one in (strategy, "auto")
    ]
    assert_same_steps(*runs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hooks_of_parameters(strategy: str) -> None:
    def hooked(make: Any, params: Any) -> Any:
        params = list(params)
        params[0].register_hook(lambda gradient: gradient.clamp(-20.0, 20.0))
        return make(params)

    make = partial(hooked, OPTIMIZERS["ours"])
    _, found = train(Scaled(make), strategy)
    assert_same_steps(found, by_hand(make), **(EXACT if strategy == "auto" else CLOSE))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_that_are_dropped_altogether(strategy: str) -> None:
    """No step is made, and the scale stays. Without the callback torch's error ends the training."""

    class Dropping(Model):
        def on_after_backward(self) -> None:
            if self.trainer.fit_loop.epoch_loop.batch_idx in (0, 3):
                self.zero_grad()

    callback = LossScaling(init_scale=256.0, growth_interval=6)
    run, found = train(Dropping(), strategy, callback)
    moved = [any(not torch.equal(a[key], b[key]) for key in a) for a, b in itertools.pairwise(found.weights)]
    assert moved == [batch != 3 for batch in range(1, 8)]
    assert states(run)["scale"] == 512.0
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        fit(Dropping(), "auto", plugins=[scaled()])
