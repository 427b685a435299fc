"""SAM in a Trainer with one of our strategies, in the graph or detached, is SAM in a plain PyTorch loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim.strategies import InGraphStrategy

from .common import ROOTS, fit, known_warnings, scaled
from .replayed import BASES, ByHand, assert_weights, noisy_class, sam

pytestmark = [*known_warnings, pytest.mark.usefixtures("one_thread")]

#: float32 in another order of operations, over eight steps of up to 0.05.
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "4 micro-batches": ({"accumulate_grad_batches": 4}, {"accumulate": 4}),
    "a last window of 2": ({"accumulate_grad_batches": 3}, {"accumulate": 3}),
    "clip": ({"gradient_clip_val": 0.5}, {"clip": 0.5}),
    "4 micro-batches, clip": (
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5},
        {"accumulate": 4, "clip": 0.5},
    ),
}


EITHER = pytest.mark.parametrize("strategy", ["in_graph", "detached"])


@EITHER
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", BASES)
def test_steps(name: str, case: str, strategy: str) -> None:
    options, by_hand = CASES[case]
    model = noisy_class()(sam(name))
    _, found = fit(model, strategy, max_epochs=2, **options)
    expected = ByHand(BASES[name], **by_hand).fit(epochs=2)
    assert_weights(found, expected, **CLOSE)
    for (key, buffer), theirs in zip(model.net.named_buffers(), expected.net.buffers(), strict=True):
        torch.testing.assert_close(buffer, theirs, **CLOSE, msg=key)


@pytest.mark.parametrize("root", ROOTS)
def test_either_lightning_and_asam(root: str) -> None:
    options = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5}
    run, found = fit(noisy_class(root)(sam(rho=0.3, adaptive=True)), **options)
    assert type(run.strategy).__module__.endswith(root.partition(".")[0])
    expected = ByHand(BASES["ours"], rho=0.3, adaptive=True, accumulate=4, clip=0.5).fit()
    assert_weights(found, expected, **CLOSE)
    plain = ByHand(BASES["ours"], rho=0.3, accumulate=4, clip=0.5).fit()
    assert not torch.equal(plain.weights[-1]["net.0.weight"], expected.weights[-1]["net.0.weight"])


@EITHER
@pytest.mark.parametrize("overflows", [set(), {0}, {5}])
@pytest.mark.parametrize("name", BASES)
def test_16_mixed(name: str, overflows: set[int], strategy: str) -> None:
    """Unscaled, clipped, and left out as any other step; float16 gradients that differ by a bit make the tolerance."""
    model = noisy_class()(sam(name))
    model.overflows = overflows
    options = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5}
    run, found = fit(model, strategy, plugins=[scaled()], **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.ones(()))
    expected = ByHand(BASES[name], accumulate=4, clip=0.5, scaler=scaler, overflows=overflows).fit()
    assert_weights(found, expected, rtol=1e-6, atol=1e-6)
    assert run.precision_plugin.scaler.get_scale() == (128.0 if overflows else 256.0)


def test_bf16_mixed() -> None:
    """The second pass runs under autocast too: with it, and only with it, the losses are rounded to bfloat16."""
    seen: list[Any] = []

    class Dtypes(noisy_class()):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(self.net(batch[0]).dtype)
            return super().training_step(batch, batch_idx)

    fit(Dtypes(sam()), precision="bf16-mixed", max_steps=2)
    assert seen == [torch.bfloat16] * 4


def test_hooks_and_logs_come_once() -> None:
    from lightning.pytorch import Callback

    calls: list[str] = []

    class Counting(Callback):
        def on_before_zero_grad(self, *_: Any) -> None:
            calls.append("zero_grad")

        def on_before_backward(self, *_: Any) -> None:
            calls.append("before_backward")

        def on_after_backward(self, *_: Any) -> None:
            calls.append("after_backward")

        def on_before_optimizer_step(self, *_: Any) -> None:
            calls.append("step")

    seen: list[torch.Tensor] = []

    class Clipping(noisy_class()):  # type: ignore[misc]
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            seen.append(self.net[0].weight.grad.clone())
            self.called.append("clip")

    model = Clipping(sam())
    run, _ = fit(model, accumulate_grad_batches=4, callbacks=[Counting()])
    window = ["zero_grad"] + ["before_backward", "after_backward"] * 4 + ["step"]
    assert calls == window * 2
    assert model.called == ["zero_grad"] + ["before_backward", "after_backward"] * 4 + ["clip"] + (
        ["zero_grad"] + ["before_backward", "after_backward"] * 4 + ["clip"]
    )
    assert model.evaluated == 16
    by_hand = ByHand(BASES["ours"], accumulate=4).fit()
    assert len(by_hand.losses) == 8
    assert run.callback_metrics["loss_epoch"].item() == pytest.approx(sum(by_hand.losses) / 8, rel=1e-5)
    # What the hooks see last are the gradients that are stepped with.
    torch.testing.assert_close(seen[-1], next(by_hand.net.parameters()).grad, rtol=1e-4, atol=1e-5)
    assert "log" not in vars(model)


def test_metrics_are_updated_once() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Measuring(noisy_class()):  # type: ignore[misc]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.metric = torchmetrics.MeanMetric()
            self.catting = torchmetrics.CatMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.metric(float(batch_idx))
            self.catting.update(float(batch_idx))
            self.log("mean", self.metric, on_epoch=True, on_step=False)
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            self.catted = self.catting.compute()

    model = Measuring(sam())
    run, _ = fit(model, accumulate_grad_batches=4)
    assert run.callback_metrics["mean"].item() == 3.5
    assert model.catted.tolist() == list(range(8))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_training_step_may_return_none(accumulate: int) -> None:
    class SometimesNothing(noisy_class()):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in self.nothing else super().training_step(batch, batch_idx)

    model = SometimesNothing(sam())
    model.nothing = {1, 7}
    _, found = fit(model, accumulate_grad_batches=accumulate)
    expected = ByHand(BASES["ours"], accumulate=accumulate)
    x, y = (tensor.split(4) for tensor in model.train_dataloader().dataset.tensors)
    weights = []
    for at in range(0, 8, accumulate):
        window = [(i, x[i], y[i]) for i in range(at, at + accumulate) if i not in model.nothing]
        if window:
            expected.step(window)
        weights.append(expected._noted())
    expected.weights = weights
    found.weights = found.weights[accumulate - 1 :: accumulate]
    assert_weights(found, expected, **CLOSE)


def test_windows_that_change_their_length() -> None:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    schedule = GradientAccumulationScheduler({0: 4, 1: 2})
    _, found = fit(noisy_class()(sam()), max_epochs=2, callbacks=[schedule])
    expected = ByHand(BASES["ours"], accumulate=4).fit()
    expected.accumulate = 2
    assert_weights(found, expected.fit(), **CLOSE)


def test_a_window_that_is_cut_off_is_forgotten() -> None:
    """With its gradients, which Lightning clears before the next one."""

    class Skipping(noisy_class()):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            super().on_train_batch_start(batch, batch_idx)
            return -1 if (self.current_epoch, batch_idx) == (0, 2) else None

    model = Skipping(sam())
    _, found = fit(model, max_epochs=2, accumulate_grad_batches=4)
    found.weights = found.weights[2:]  # of the two batches before
    assert_weights(found, ByHand(BASES["ours"], accumulate=4).fit(), **CLOSE)


@pytest.mark.parametrize("case", [{}, {"plugins": True}])
def test_resuming_gives_the_same_bits(case: dict[str, Any], tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        return {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5} | {key: [scaled()] for key in case}

    _, straight = fit(noisy_class()(sam()), max_epochs=3, **options())
    half, _ = fit(noisy_class()(sam()), max_epochs=1, **options())
    half.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["optimizer_states"][0]
    assert saved["param_groups"][0]["sam_rho"] == 0.5
    _, rest = fit(noisy_class()(sam(rho=0.1)), max_epochs=3, ckpt_path=tmp_path / "half.ckpt", **options())
    assert len(rest.weights) == 16
    for found, expected in zip(rest.weights, straight.weights[8:], strict=True):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_checkpoints_are_those_of_the_base(tmp_path: Path) -> None:
    """A run goes on without SAM, and with it again."""
    first, _ = fit(noisy_class()(sam()))
    first.save_checkpoint(tmp_path / "sam.ckpt")
    second, found = fit(noisy_class()(BASES["ours"]), max_epochs=2, ckpt_path=tmp_path / "sam.ckpt")
    assert len(found.weights) == 8
    second.save_checkpoint(tmp_path / "base.ckpt")
    third, _ = fit(noisy_class()(sam()), max_epochs=3, ckpt_path=tmp_path / "base.ckpt")
    assert third.optimizers[0].param_groups[0]["sam_rho"] == 0.5


def test_schedules_and_reports() -> None:
    class Scheduled(noisy_class()):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = self.make(self.parameters())
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    run, found = fit(Scheduled(sam()), accumulate_grad_batches=4)
    assert found.lrs == [pytest.approx(0.03 / n) for n in (1, 1, 1, 2, 2, 2, 2, 3)]
    assert "SAM over lightning_optim's AdamW is stepped by: AdamW" in run.strategy.report()
    foreign, _ = fit(noisy_class()(sam("foreign")), max_steps=1)
    assert "SAM over foreign's Foreign runs its own step" in foreign.strategy.report()


def test_an_error_in_the_second_pass_leaves_the_weights_as_they_were() -> None:
    class Failing(noisy_class()):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.evaluated == 2:
                raise ZeroDivisionError
            if self.evaluated == 1:
                self.before = [p.detach().clone() for p in self.net.parameters()]
            return super().training_step(batch, batch_idx)

    model = Failing(sam())
    with pytest.raises(ZeroDivisionError):
        fit(model, accumulate_grad_batches=2)
    assert all(torch.equal(p, q) for p, q in zip(model.net.parameters(), model.before, strict=True))
    assert "log" not in vars(model)


def test_a_batch_that_has_no_loss_the_second_time() -> None:
    class Fickle(noisy_class()):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if self.evaluated == 1 else super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match=r"batch 1 of 1 had a loss and, evaluated again .* has none"):
        fit(Fickle(sam()))


class Iterating(noisy_class()):  # type: ignore[misc]
    def training_step(self, dataloader_iter: Any) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    ("strategy", "model", "message"),
    [
        ({"step_in_backward": True}, noisy_class(), r"SAM with step_in_backward=True.*valid: step_in_backward=False"),
        ({"capture": True}, noisy_class(), r"SAM with capture=True.*valid: capture=False"),
        ({}, Iterating, r"SAM with training_step\(dataloader_iter\).*valid: training_step\(batch\)"),
    ],
)
def test_what_is_refused(strategy: dict[str, Any], model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(model(sam()), InGraphStrategy(**strategy))


class ByHandInAModule(noisy_class()):  # type: ignore[misc]
    """Manual optimization: both passes are the module's own."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for move in (optimizer.perturb, optimizer.restore):
            optimizer.zero_grad()
            torch.manual_seed(1000 + batch_idx)
            state = {key: value.clone() for key, value in self.net.named_buffers()}
            self.manual_backward(nn.functional.mse_loss(self.net(batch[0]), batch[1]))
            move()
        for key, value in self.net.named_buffers():
            value.copy_(state[key])
        optimizer.step()


@pytest.mark.parametrize("strategy", ["in_graph", "auto"])
def test_manual_optimization(strategy: str) -> None:
    _, found = fit(ByHandInAModule(sam()), strategy)
    assert_weights(found, ByHand(BASES["ours"]).fit(), **CLOSE)
