"""``16-mixed``: unscaling and the search for infinite gradients inside of the step, and schedules of steps left out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.strategies.scaler import InStepScaler

from .common import (
    EXACT,
    OPTIMIZERS,
    Model,
    assert_same_steps,
    fit,
    known_warnings,
    scaled,
)

pytestmark = known_warnings

#: Gradients of float16 math, of weights that are 1e-7 apart, may round to another float16 number: 1e-3 of themselves.
#: What is compared below was chosen not to; the rest is a factor in another place, as in float32.
CLIP = {"gradient_clip_val": 0.5}
EACH = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many gradients are unscaled in a pass of its own."""
    called: list[int] = []
    stock = torch._amp_foreach_non_finite_check_and_unscale_

    def counted(grads: list[Tensor], *args: Any) -> None:
        called.append(len(grads))
        stock(grads, *args)

    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", counted)
    return called


class Overflowing(Model):
    """The gradients of the third and of the sixth batch do not fit into float16."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.overflows = {2, 5}


class Constant(Overflowing):
    """As Lightning advances schedules in steps that were left out, runs are comparable without one."""

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()["optimizer"]


@EACH
@pytest.mark.parametrize(
    "options", [{}, CLIP, CLIP | {"accumulate_grad_batches": 2}, CLIP | {"gradient_clip_algorithm": "value"}]
)
def test_steps(name: str, options: dict[str, Any]) -> None:
    run, found = fit(Constant(OPTIMIZERS[name]), plugins=[scaled(growth_interval=2)], **options)
    stock, expected = fit(Constant(OPTIMIZERS[name]), "auto", plugins=[scaled(growth_interval=2)], **options)
    assert_same_steps(found, expected)
    state = run.precision_plugin.state_dict()
    assert state == stock.precision_plugin.state_dict()
    assert state["scale"] != 256.0
    left_out = [a for a, b in itertools.pairwise(found.weights) if all(torch.equal(a[key], b[key]) for key in a)]
    assert len(left_out) >= 2


@pytest.mark.parametrize("name", ["ours", "torch AdamW", "torch SGD"])
def test_no_pass_of_its_own(name: str, passes: list[int]) -> None:
    fit(Model(OPTIMIZERS[name]), plugins=[scaled()], **CLIP)
    assert passes == []
    fit(Model(OPTIMIZERS["foreign"]), plugins=[scaled()], **CLIP)
    assert passes == [6] * 8


class Looking(Constant):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen = [*getattr(self, "seen", []), self.net[0].weight.grad.clone()]


class Halving(Constant):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.net[0].weight.grad.clamp_(-0.5, 0.5)
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")


@pytest.mark.parametrize("name", ["ours", "torch AdamW"])
@pytest.mark.parametrize("model", [Looking, Halving])
def test_hooks_see_gradients_that_are_unscaled(name: str, model: Any, passes: list[int]) -> None:
    """Then there is a pass, as in Lightning's own strategies."""
    ours, stock = model(OPTIMIZERS[name]), model(OPTIMIZERS[name])
    _, found = fit(ours, plugins=[scaled()])
    assert len(passes) == 8
    _, expected = fit(stock, "auto", plugins=[scaled()])
    assert_same_steps(found, expected)
    for one, other in zip(getattr(ours, "seen", []), getattr(stock, "seen", []), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3, equal_nan=True)


@EACH
def test_schedules_do_not_count_steps_that_were_left_out(name: str) -> None:
    model = Overflowing(OPTIMIZERS[name])
    run, found = fit(model, plugins=[scaled()])
    lr = 0.01 if name == "foreign" else 0.05
    assert found.lrs == [pytest.approx(lr / (1 + done)) for done in (1, 2, 2, 3, 4, 4, 5, 6)]
    assert "lr_scheduler_step" not in model.__dict__
    _, stock = fit(Overflowing(OPTIMIZERS[name]), "auto", plugins=[scaled()])
    assert stock.lrs == [pytest.approx(lr / (1 + done)) for done in range(1, 9)]
    assert run.global_step == 8


def test_other_schedules_are_left_alone() -> None:
    """Those by epoch, and of every second batch; and a module's own way of advancing them is the one that is used."""

    class Two(Overflowing):
        def configure_optimizers(self) -> Any:
            optimizer = self.make(self.parameters())
            factor = torch.optim.lr_scheduler.LambdaLR
            self.schedules = [factor(optimizer, lambda step: 1.0) for _ in range(3)]
            kinds: list[dict[str, Any]] = [{"interval": "epoch"}, {"frequency": 2}, {}]
            configs = [
                {"interval": "step", "scheduler": one} | kind for one, kind in zip(self.schedules, kinds, strict=True)
            ]
            return [optimizer], configs

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            self.calls = [*getattr(self, "calls", []), self.schedules.index(scheduler)]
            super().lr_scheduler_step(scheduler, metric)

    model = Two()
    fit(model, plugins=[scaled()])
    # Batches 2 and 5 are left out: the second of them is one of the schedule for every second batch.
    assert model.calls == [2, 1, 2, 1, 2, 2, 2, 1, 2, 0]
    assert [one.last_epoch for one in model.schedules] == [1, 3, 6]


def test_the_users_scaler_is_the_one() -> None:
    """Its settings hold, and it shows what went on; afterwards it is the plugin's again."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_factor=4.0, growth_interval=3)
    plugin = scaled()
    plugin.scaler = scaler
    seen: list[Any] = []

    class Watching(Model):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append((type(plugin.scaler), scaler.get_scale()))

    fit(Watching(), plugins=[plugin])
    assert [scale for _, scale in seen] == [64.0, 64.0, 256.0, 256.0, 256.0, 1024.0, 1024.0, 1024.0]
    assert {cls for cls, _ in seen} == {InStepScaler}
    assert plugin.scaler is scaler


class OwnScaler(torch.amp.GradScaler):
    pass


@pytest.mark.parametrize("name", ["ours", "torch AdamW"])
def test_a_scaler_of_another_class_goes_its_own_way(name: str, passes: list[int]) -> None:
    plugins = [scaled(), scaled()]
    for plugin in plugins:
        plugin.scaler = OwnScaler("cpu", init_scale=256.0)
    _, found = fit(Constant(OPTIMIZERS[name]), plugins=plugins[:1], **CLIP)
    assert len(passes) == 8
    _, expected = fit(Constant(OPTIMIZERS[name]), "auto", plugins=plugins[1:], **CLIP)
    assert_same_steps(found, expected)


@pytest.mark.parametrize("name", ["ours", "torch AdamW"])
@pytest.mark.parametrize(("first", "second"), [("auto", "in_graph"), ("in_graph", "auto")])
def test_the_scalers_state_is_in_checkpoints(name: str, first: str, second: str, tmp_path: Path) -> None:
    """Interchangeable with Lightning's own strategies."""
    make = OPTIMIZERS[name]
    half, _ = fit(Constant(make), first, plugins=[scaled(growth_interval=3)])
    half.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["MixedPrecision"] == half.precision_plugin.state_dict()
    rest, found = fit(
        Constant(make), second, plugins=[scaled(growth_interval=9)], max_epochs=2, ckpt_path=tmp_path / "half.ckpt"
    )
    straight, expected = fit(Constant(make), "auto", plugins=[scaled(growth_interval=3)], max_epochs=2)
    expected.weights, expected.lrs = expected.weights[8:], expected.lrs[8:]
    assert_same_steps(found, expected)
    assert rest.precision_plugin.state_dict() == straight.precision_plugin.state_dict()


class Manual(Constant):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@EACH
def test_manual_optimization(name: str) -> None:
    run, found = fit(Manual(OPTIMIZERS[name]), plugins=[scaled()])
    stock, expected = fit(Manual(OPTIMIZERS[name]), "auto", plugins=[scaled()])
    assert_same_steps(found, expected)
    assert run.precision_plugin.state_dict() == stock.precision_plugin.state_dict()


def test_no_gradient_at_all_is_torchs_error() -> None:
    class Forgetful(Manual):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.trainer.precision_plugin.scaler.scale(torch.ones(()))
            self.optimizers().step()

    for strategy in ("in_graph", "auto"):
        with pytest.raises(AssertionError, match="No inf checks were recorded"):
            fit(Forgetful(), strategy, plugins=[scaled()])


def test_exactly_the_same_without_a_scaler() -> None:
    """A scaler that never scales gives the bits of a training without one."""
    from lightning.pytorch.plugins import Precision

    plain = scaled(init_scale=1.0)
    plain.forward_context = Precision().forward_context
    _, found = fit(Model(OPTIMIZERS["ours"]), plugins=[plain])
    _, expected = fit(Model(OPTIMIZERS["ours"]), "auto")
    assert_same_steps(found, expected, **EXACT)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ours", "torch AdamW"])
def test_on_cuda_nothing_waits_for_the_device(name: str) -> None:
    """The step of a training in 16-mixed reads nothing back; its schedule learns of it at the next step."""

    class Strict(Overflowing):
        def on_train_batch_start(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    _, found = fit(Strict(OPTIMIZERS[name]), accelerator="cuda", precision="16-mixed", **CLIP)
    assert found.lrs == [pytest.approx(0.05 / (1 + done)) for done in (1, 2, 3, 3, 4, 5, 5, 6)]
