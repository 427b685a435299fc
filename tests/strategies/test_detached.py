"""``detached``: every step is that of Lightning's own strategy, or of float32 masters updated by torch."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from foreign import Foreign
from torch import Tensor

import lightning_optim
from lightning_optim.strategies import DetachedStrategy

from .common import (
    CLOSE,
    OPTIMIZERS,
    Model,
    assert_same_state,
    assert_same_steps,
    fit,
    known_warnings,
    make_trainer,
    model_class,
    scaled,
)
from .masters import ByHand, Straight
from .test_steps import SometimesNothing, TwoOptimizers

pytestmark = known_warnings

CLIP = {"gradient_clip_val": 0.5}
ACCUMULATE = {"accumulate_grad_batches": 4}
TRAINERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": CLIP,
    "accumulate": {"accumulate_grad_batches": 3},
    "clip and accumulate": CLIP | {"accumulate_grad_batches": 3},
    "clip by value": CLIP | {"gradient_clip_algorithm": "value"},
    "bf16-mixed, clip": CLIP | {"precision": "bf16-mixed"},
}
#: Buckets so small that each tensor is one, and updates that are taken back and done again.
STRATEGIES: dict[str, dict[str, Any]] = {
    "exact": {},
    "small buckets": {"bucket_mb": 1e-5},
    "speculative": {"bucket_mb": 1e-5, "clip": "speculative"},
    "waiting in the forward pass": {"bucket_mb": 1e-5, "wait": "forward"},
    "half on the device": {"bucket_mb": 1e-5, "device_fraction": 0.5},
}
TORCHS: dict[str, Any] = {
    "torch AdamW": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
    "torch SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "foreign": partial(Foreign, lr=0.01),
}


def detached(case: str, name: str) -> Any:
    options = STRATEGIES[case]
    if name == "foreign" and {"clip", "device_fraction", "wait"} & options.keys():
        pytest.skip("an optimizer that runs its own step does so for all masters at once")
    return DetachedStrategy(**options)


@pytest.mark.matrix(unless=lambda name, case: name in ("ours", "foreign") or case == "clip and accumulate")
@pytest.mark.parametrize(
    ("case", "how"), [*product(TRAINERS, ["exact", "speculative"]), *product(["clip and accumulate"], STRATEGIES)]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:.*is of no use here")
def test_float32_weights(name: str, case: str, how: str) -> None:
    """Masters are the weights: the steps of Lightning's own strategy."""
    run, found = fit(Model(OPTIMIZERS[name]), detached(how, name), **TRAINERS[case])
    stock, expected = fit(Model(OPTIMIZERS[name]), "auto", **TRAINERS[case])
    assert_same_steps(found, expected, **CLOSE)
    assert_same_state(run.optimizers[0].state_dict(), stock.optimizers[0].state_dict())


@pytest.mark.parametrize("how", ["waiting in the forward pass", "speculative"])
@pytest.mark.parametrize("case", [{}, CLIP, ACCUMULATE, CLIP | ACCUMULATE])
@pytest.mark.parametrize("name", TORCHS)
def test_bfloat16_weights(name: str, case: dict[str, Any], how: str) -> None:
    """Weights are float32 masters, updated by torch, rounded to bfloat16: one bit apart where these round apart."""
    _, found = fit(Straight(TORCHS[name]), detached(how, name), precision="bf16-true", **case)
    options = dict(case)
    reference = partial(ByHand, make=TORCHS[name], max_norm=options.pop("gradient_clip_val", None))
    _, expected = fit(Straight(reference), "auto", precision="bf16-true", **options)
    apart = sum(
        (step[key] != other[key]).sum().item()
        for step, other in zip(found.weights, expected.weights, strict=True)
        for key in step
    )
    assert apart <= 2  # of 8 x 182; masters that are 1e-7 apart round apart once in 40,000
    assert_same_steps(found, expected, rtol=1 / 128, atol=0)


@pytest.mark.parametrize("how", ["exact", "speculative"])
def test_bfloat16_masters_do_not_lose_small_steps(how: str) -> None:
    """Steps under half a bit of the weight, which bfloat16 alone would never make."""

    class Ones(Straight):
        def configure_optimizers(self) -> Any:
            for p in self.parameters():
                p.data.fill_(1.0)
            return torch.optim.SGD(self.parameters(), lr=1.5e-3)

    run, found = fit(Ones(), detached(how, "sgd"), precision="bf16-true", max_epochs=4)
    assert any((step != 1).any() for step in found.weights[-1].values())
    _, alone = fit(Ones(), "auto", precision="bf16-true", max_epochs=4)
    assert all((step == 1).all() for step in alone.weights[-1].values())
    assert "masters in float32" in run.strategy.report()


class Overflowing(Model):
    """As Lightning advances schedules in steps that were left out, runs are comparable without one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.overflows = {2, 5}

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()["optimizer"]


@pytest.mark.parametrize("how", ["exact", "speculative"])
@pytest.mark.parametrize("options", [{}, CLIP | {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_scale(name: str, options: dict[str, Any], how: str) -> None:
    run, found = fit(Overflowing(OPTIMIZERS[name]), detached(how, name), plugins=[scaled()], **options)
    stock, expected = fit(Overflowing(OPTIMIZERS[name]), "auto", plugins=[scaled()], **options)
    assert_same_steps(found, expected)
    assert run.precision_plugin.state_dict() == stock.precision_plugin.state_dict()


def test_schedules_do_not_count_steps_that_were_left_out() -> None:
    model = Model(OPTIMIZERS["ours"])
    model.overflows = {2}
    _, found = fit(model, "detached", plugins=[scaled()])
    assert len(set(found.lrs)) == len(found.lrs) - 1


@pytest.mark.parametrize("name", lightning_optim.list_optimizers())
def test_all_of_ours(name: str) -> None:
    if name in ("lbfgs", "sam", "sophia"):
        pytest.skip("they evaluate the model again: see test_replay, and test_replay_curvature for the refusal")

    def make(params: Any) -> torch.optim.Optimizer:
        # Of gradients of low rank, SOAP's bases are not unique: rounding would say which.
        unique: dict[str, Any] = {"max_precond_dim": 1} if name == "soap" else {}
        return lightning_optim.create_optimizer(name, list(params), lr=0.01, **unique)

    _, found = fit(Model(make), "detached", **CLIP)
    _, expected = fit(Model(make), "auto", **CLIP)
    assert_same_steps(found, expected, rtol=1e-5, atol=1e-5)  # Muon's iteration enlarges what float32 rounds


def test_manual_optimization() -> None:
    _, found = fit(TwoOptimizers(), "detached")
    _, expected = fit(TwoOptimizers(), "auto")
    assert_same_steps(found, expected)


def test_batches_without_a_loss() -> None:
    _, found = fit(SometimesNothing(OPTIMIZERS["ours"]), "detached", accumulate_grad_batches=2)
    _, expected = fit(SometimesNothing(OPTIMIZERS["ours"]), "auto", accumulate_grad_batches=2)
    assert_same_steps(found, expected)


class Looking(Model):
    """Gradients are looked at, and changed, where Lightning offers it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.norms: list[Tensor] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        del optimizer
        for p in self.parameters():
            assert p.grad is not None
            p.grad.mul_(0.5)
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))


@pytest.mark.parametrize("how", ["exact", "speculative"])
def test_hooks_see_gradients_and_may_change_them(how: str) -> None:
    ours, stock = Looking(OPTIMIZERS["ours"]), Looking(OPTIMIZERS["ours"])
    strategy = detached(how, "ours")
    with pytest.warns(UserWarning, match="of no use here") if how == "speculative" else nullcontext():
        run, found = fit(ours, strategy, **CLIP)
    _, expected = fit(stock, "auto", **CLIP)
    assert_same_steps(found, expected)
    torch.testing.assert_close(ours.norms, stock.norms)
    assert "gradients stay on the device until the step" in run.strategy._report


class Clamping(Model):
    """Weights that are changed behind the optimizer's back."""

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.4, 0.4)


def test_weights_changed_by_others_are_followed() -> None:
    _, found = fit(Clamping(OPTIMIZERS["ours"]), "detached")
    _, expected = fit(Clamping(OPTIMIZERS["ours"]), "auto")
    assert_same_steps(found, expected)


@pytest.mark.parametrize("name", ["ours", "foreign"])
def test_the_other_lightning(name: str) -> None:
    model = model_class("pytorch_lightning")
    run, found = fit(model(OPTIMIZERS[name]), "detached", **CLIP, accumulate_grad_batches=2)
    assert type(run.strategy).__module__ == "lightning_optim.strategies.pytorch_lightning"
    _, expected = fit(model(OPTIMIZERS[name]), "auto", **CLIP, accumulate_grad_batches=2)
    assert_same_steps(found, expected)


class Asking(Model):
    """Says whether weights had still to land when a batch began."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.pending: list[bool] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        (drive,) = self.trainer.strategy._drives.values()
        self.pending.append(drive.detached._landing.is_pending)
        return super().training_step(batch, batch_idx)


def nobody(*_: Any) -> None:
    """It might read the weights."""


@pytest.mark.parametrize(
    "hook", [None, "on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_validation_start", "Lightning's own"]
)
def test_weights_are_waited_for_in_the_forward_pass_unless_somebody_looks(hook: str | None) -> None:
    import lightning.pytorch as pl

    callbacks = [] if hook is None else [type("Looking", (pl.Callback,), {hook: nobody})()]
    if hook == "Lightning's own":
        callbacks = [pl.callbacks.LambdaCallback(on_train_batch_end=nobody)]
    model = Asking(OPTIMIZERS["ours"])
    strategy = DetachedStrategy(wait="forward")
    make_trainer(strategy=strategy, callbacks=callbacks).fit(model)
    assert any(model.pending) != (hook is not None)
    assert "waited for in the forward pass" in strategy.report()


def test_delayed_steps_are_those_of_gradients_one_step_old() -> None:
    """With gradients that do not depend on the weights, the weights are only one step late."""
    make = partial(torch.optim.SGD, lr=0.05)
    _, found = fit(Straight(make), DetachedStrategy(delay_one_step=True))
    _, expected = fit(Straight(make), "auto")
    expected.weights = [found.weights[0], *expected.weights[:-1]]
    assert_same_steps(found, expected)


def test_delayed_steps_are_made_up_for_in_the_end() -> None:
    make = partial(torch.optim.SGD, lr=0.05)
    models = [Straight(make), Straight(make)]
    for model, strategy in zip(models, [DetachedStrategy(delay_one_step=True), "auto"], strict=True):
        fit(model, strategy)
    for ours, stock in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"master_dtype": "bfloat16"}, "master_dtype='bfloat16'; valid: float32, float64"),
        ({"clip": "sometimes"}, "clip='sometimes'; valid: exact, speculative, none"),
        ({"bucket_mb": 0}, "bucket_mb=0"),
        ({"device_fraction": 2}, "device_fraction=2"),
        ({"delay_one_step": True, "clip": "none"}, "delay_one_step=True with clip='none'"),
        ({"engine": "fast"}, "engine='fast'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetachedStrategy(**options)


@pytest.mark.parametrize("options", [CLIP, {"plugins": [scaled()]}])
def test_no_clipping_means_none(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="clip='none' with"):
        fit(Model(OPTIMIZERS["ours"]), DetachedStrategy(clip="none"), **options)


def test_what_is_waited_for_later_cannot_be_stepped_whole() -> None:
    """Its param groups would have masters in them, and the next learning rate, while it steps."""
    with pytest.raises(ValueError, match=r"wait='forward' with Foreign.*valid: wait='step'"):
        fit(Model(OPTIMIZERS["foreign"]), DetachedStrategy(wait="forward"))


def test_an_error_of_a_backward_pass_is_not_lost_where_updates_cannot_be_taken_back() -> None:
    class Failing(Model):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            if batch_idx == 4:
                self.net[0].weight.register_hook(self.fail)
            return super().training_step(batch, batch_idx)

        def fail(self, grad: Tensor) -> None:
            raise OSError("the user's own")

    strategy = DetachedStrategy(clip="none", bucket_mb=1e-5)
    with pytest.raises(OSError, match="the user's own") as found:
        fit(Failing(OPTIMIZERS["ours"]), strategy)
    assert "was updated in the backward pass" in found.value.__notes__[0]
    assert strategy._drives is None


def test_no_clipping_steps_in_the_backward_pass() -> None:
    _, found = fit(Model(OPTIMIZERS["ours"]), DetachedStrategy(clip="none", bucket_mb=1e-5))
    _, expected = fit(Model(OPTIMIZERS["ours"]), "auto")
    assert_same_steps(found, expected)


def test_it_leaves_as_it_came() -> None:
    """No hooks, no replaced methods, no thread; the optimizer goes on by itself."""
    import threading

    before = threading.active_count()
    model = Model(OPTIMIZERS["ours"])
    trainer, _ = fit(model, "detached")
    (optimizer,) = trainer.optimizers
    assert not {"zero_grad", "step"} & {k for k, v in vars(optimizer).items() if not hasattr(v, "_wrapped_by_lr_sched")}
    assert all(not getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
    assert threading.active_count() <= before
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_validation_in_between() -> None:
    class Validated(Model):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.seen = {name: p.detach().clone() for name, p in self.named_parameters()}

        def val_dataloader(self) -> Any:
            return self.train_dataloader()

    models = [Validated(OPTIMIZERS["ours"]), Validated(OPTIMIZERS["ours"])]
    for model, strategy in zip(models, [DetachedStrategy(delay_one_step=True), "auto"], strict=True):
        make_trainer(strategy=strategy, val_check_interval=1, limit_train_batches=1, num_sanity_val_steps=0).fit(model)
    torch.testing.assert_close(models[0].seen, models[1].seen)
