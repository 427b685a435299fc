"""Every step is that of Lightning's own strategy: clipped, accumulated, in every precision, of every optimizer."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim.strategies import InGraphStrategy
from lightning_optim.strategies.drive import why_own_step

from .common import (
    CLOSE,
    EXACT,
    OPTIMIZERS,
    Model,
    assert_same_state,
    assert_same_steps,
    fit,
    known_warnings,
    model_class,
    scaled,
)

pytestmark = known_warnings

CLIP = {"gradient_clip_val": 0.5}
TRAINERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": CLIP,
    "accumulate": {"accumulate_grad_batches": 3},
    "clip and accumulate": CLIP | {"accumulate_grad_batches": 3},
    "clip by value": CLIP | {"gradient_clip_algorithm": "value"},
    "bf16-mixed, clip": CLIP | {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("case", TRAINERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps(name: str, case: str) -> None:
    options = TRAINERS[case]
    run, found = fit(Model(OPTIMIZERS[name]), **options)
    stock, expected = fit(Model(OPTIMIZERS[name]), "auto", **options)
    # The same engine on the same gradients gives the same bits; clipping by norm is a factor in another place.
    exact = name == "foreign" or (name == "ours" and (case in ("plain", "accumulate") or "value" in case))
    assert_same_steps(found, expected, **EXACT if exact else CLOSE)
    assert_same_state(run.optimizers[0].state_dict(), stock.optimizers[0].state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bf16_true(name: str) -> None:
    """Weights in bfloat16. Ours keep float32 in between; torch's Adam, and clipping in place, round at every operation:
    a bit of bfloat16 or two, 1/128 of the weight, over eight steps.
    """
    options = CLIP | {"precision": "bf16-true"}
    _, found = fit(Model(OPTIMIZERS[name]), **options)
    _, expected = fit(Model(OPTIMIZERS[name]), "auto", **options)
    assert_same_steps(found, expected, **EXACT if name == "foreign" else {"rtol": 1 / 32, "atol": 1 / 64})


@pytest.mark.parametrize("name", ["ours", "torch AdamW"])
def test_the_other_lightning(name: str) -> None:
    model = model_class("pytorch_lightning")
    run, found = fit(model(OPTIMIZERS[name]), **CLIP, accumulate_grad_batches=2)
    assert type(run.strategy).__module__ == "lightning_optim.strategies.pytorch_lightning"
    _, expected = fit(model(OPTIMIZERS[name]), "auto", **CLIP, accumulate_grad_batches=2)
    assert_same_steps(found, expected)


class TwoOptimizers(Model):
    """Manual optimization: one part with a closure, the other by hand and every second time."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first, second = self.net[0].parameters(), self.net[1:].parameters()
        optimizers = [torch.optim.AdamW(first, lr=0.05), lightning_optim.Lion(second, lr=0.01)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(one, 2) for one in optimizers]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()

        def closure() -> Tensor:
            first.zero_grad()
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        first.step(closure)
        if batch_idx % 2:
            self.clip_gradients(second, 0.5, "norm")
            norm = nn.utils.get_total_norm([p.grad for p in self.net[1:].parameters()])
            assert norm < 0.51  # at once, as this may be what the module goes on with
            second.step()
            second.zero_grad()
            for schedule in self.lr_schedulers():
                schedule.step()


def test_manual_optimization() -> None:
    run, found = fit(TwoOptimizers())
    _, expected = fit(TwoOptimizers(), "auto")
    assert_same_steps(found, expected)
    report = run.strategy.report()
    assert "torch's AdamW is stepped by: AdamW" in report
    assert "lightning_optim's Lion is stepped by: Lion" in report


class SometimesNothing(Model):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return None if batch_idx in (1, 4, 5) else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("name", ["ours", "torch AdamW"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_step_may_return_none(name: str, accumulate: int) -> None:
    options = CLIP | {"accumulate_grad_batches": accumulate}
    _, found = fit(SometimesNothing(OPTIMIZERS[name]), **options)
    _, expected = fit(SometimesNothing(OPTIMIZERS[name]), "auto", **options)
    assert_same_steps(found, expected)


class Ordered(Model):
    """Notes who is called, and what the gradients are then."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls: list[Any] = []

    def _note(self, what: str) -> None:
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self.calls.append((what, [grad.clone() for grad in grads]))

    def configure_optimizers(self) -> Any:
        config = super().configure_optimizers()
        config["optimizer"].register_step_pre_hook(lambda *_: self._note("step pre"))
        config["optimizer"].register_step_post_hook(lambda *_: self._note("step post"))
        return config

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self._note("zero grad")

    def on_before_backward(self, loss: Tensor) -> None:
        self._note("backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        assert optimizer is self.trainer.optimizers[0]
        self._note("optimizer step")

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        self._note("schedule")
        super().lr_scheduler_step(scheduler, metric)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hooks_come_in_the_same_order(name: str) -> None:
    models = [Ordered(OPTIMIZERS[name]) for _ in range(2)]
    for model, strategy in zip(models, ("in_graph", "auto"), strict=True):
        fit(model, strategy, accumulate_grad_batches=2)
    for (found, grads), (expected, others) in zip(models[0].calls, models[1].calls, strict=True):
        assert found == expected
        for one, other in zip(grads, others, strict=True):
            # Gradients of up to 10, of weights that differ by a millionth.
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ours", "torch AdamW", "torch Adam", "torch SGD"])
def test_the_step_reads_the_gradients_only(name: str) -> None:
    """Also when it clips them."""

    class Remembers(Model):
        def configure_optimizers(self) -> Any:
            config = super().configure_optimizers()
            config["optimizer"].register_step_post_hook(self.look)
            self.before: dict[Any, Tensor] = {}
            return config

        def on_after_backward(self) -> None:
            self.before = {p: p.grad.clone() for p in self.parameters()}

        def look(self, *_: Any) -> None:
            self.looked = all(torch.equal(p.grad, grad) for p, grad in self.before.items())
            self.clipped = nn.utils.get_total_norm(list(self.before.values())) > 0.5

    model = Remembers(OPTIMIZERS[name])
    fit(model, **CLIP)
    assert model.looked
    assert model.clipped


@pytest.mark.parametrize("name", ["ours", "torch AdamW"])
def test_engine(name: str) -> None:
    """The strategy's engine is that of adopted optimizers, and of ours while it lasts."""
    run, found = fit(Model(OPTIMIZERS[name]), InGraphStrategy(engine="eager"))
    assert "eager (requested)" in run.strategy.report()
    _, expected = fit(Model(OPTIMIZERS[name]), "auto")
    assert_same_steps(found, expected)
    if name == "ours":
        assert run.optimizers[0].options.engine == "auto"


def test_sparse_gradients() -> None:
    """torch's SGD takes them, so that it goes on to."""

    class Sparse(Model):
        def __init__(self, make: Any) -> None:
            super().__init__(make)
            self.net = nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 1))
            for p in self.net.parameters():
                nn.init.constant_(p, 0.5)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.net(torch.tensor([batch_idx % 4])).square().sum()

    for options in ({}, {"plugins": [scaled()]}):
        # Without weight decay and Nesterov, with which torch's does not.
        _, found = fit(Sparse(partial(torch.optim.SGD, lr=0.05, momentum=0.9)), **options)
        _, expected = fit(Sparse(partial(torch.optim.SGD, lr=0.05, momentum=0.9)), "auto", **options)
        assert_same_steps(found, expected)


class OwnAdamW(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class OwnLion(lightning_optim.Lion):
    def step(self, closure: Any = None, *, evaluate: Any = None) -> Any:
        return super().step(closure)


def _replaced(params: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(params, lr=0.05)
    inner = optimizer.step
    optimizer.step = lambda closure=None: inner(closure)  # type: ignore[method-assign]
    return optimizer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (OPTIMIZERS["foreign"], "Foreign; valid: "),
        (lambda params: OwnAdamW(params, lr=0.05), "OwnAdamW; valid"),
        (lambda params: OwnLion(params, lr=0.01), "its class has a step of its own"),
    ],
)
def test_what_runs_its_own_step(make: Any, reason: str) -> None:
    """Clipping included; and the report says so."""
    run, found = fit(Model(make), **CLIP)
    assert "runs its own step" in run.strategy.report()
    assert reason in run.strategy.report()
    _, expected = fit(Model(make), "auto", **CLIP)
    assert_same_steps(found, expected, **EXACT)


def test_a_differentiable_step_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], differentiable=True)
    assert "differentiable=True" in (why_own_step(optimizer) or "")


def test_a_step_that_was_replaced_is_called() -> None:
    class Unscheduled(Model):  # schedules only take methods
        def configure_optimizers(self) -> Any:
            return _replaced(self.parameters())

    run, found = fit(Unscheduled())
    assert "runs its own step: its step was replaced" in run.strategy.report()
    _, expected = fit(Unscheduled(), "auto")
    assert_same_steps(found, expected, **EXACT)


def test_nothing_is_left_behind() -> None:
    """After a training, optimizer and plugin are as they were, and the strategy holds no optimizer."""
    model = Model(OPTIMIZERS["ours"])
    run, _ = fit(model, **CLIP)
    (optimizer,) = run.optimizers
    assert "_step_supports_amp_scaling" not in vars(optimizer)
    assert hasattr(optimizer.step, "_wrapped_by_lr_sched")
    assert "clip_gradients" not in run.precision_plugin.__dict__
    alive = weakref.ref(optimizer)
    run.strategy.optimizers, run.strategy.lr_scheduler_configs = [], []
    del optimizer
    assert alive() is None
