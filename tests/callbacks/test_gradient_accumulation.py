"""``GradientAccumulation`` in Trainers: against loops by hand, and against Lightning's own accumulation."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from strategies.common import CLOSE, EXACT, OPTIMIZERS, fit, network, scaled
from torch import Tensor

import lightning_optim
from lightning_optim.callbacks import GradientAccumulation
from lightning_optim.schedulers import Linear
from lightning_optim.warnings import LightningOptimWarning

from .accumulation import (
    SGD,
    STRATEGIES,
    Ragged,
    assert_steps,
    by_hand,
    divided,
    expected_warnings,
    loss_of,
    ragged,
    sam,
)

pytestmark = expected_warnings


@pytest.fixture(autouse=True)
def _quiet(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_optim.warnings._seen", set())


#: Options, the batches of an epoch, the epochs, and how many batches each step has.
SCHEDULES: dict[str, tuple[dict[str, Any], int, int, list[int]]] = {
    "a short last window": ({"windows": 3}, 8, 2, [3, 3, 2, 3, 3, 2]),
    "by epoch": ({"windows": {0: 4, 1: 2, 2: 5}}, 7, 3, [4, 3, 2, 2, 2, 1, 5, 2]),
    "by step": ({"windows": {0: 1, 1: 2, 3: 3}, "by": "step"}, 7, 2, [1, 2, 2, 2, 3, 3, 1]),
    "across": ({"windows": 3, "across_epochs": True}, 4, 3, [3, 3, 3, 3]),
    "across short epochs": ({"windows": 4, "across_epochs": True}, 3, 3, [4, 4, 1]),
    "across, by step": ({"windows": {0: 2, 2: 5}, "by": "step", "across_epochs": True}, 4, 3, [2, 2, 5, 3]),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("weigh", [None, "tokens"], ids=["alike", "weighted"])
@pytest.mark.parametrize("case", SCHEDULES)
def test_every_schedule_is_the_loop_by_hand(case: str, weigh: str | None, strategy: str) -> None:
    options, count, epochs, lengths = SCHEDULES[case]
    accumulation = GradientAccumulation(**options, weigh=weigh)
    model = Ragged(count=count)
    run, noted = fit(model, strategy, callbacks=[accumulation], max_epochs=epochs, gradient_clip_val=2.0)
    expected = by_hand(divided(ragged(count) * epochs, *lengths), weighted=weigh is not None, clip=2.0)
    assert_steps(noted, expected)
    assert run.global_step == model.estimated == len(lengths)
    # One learning rate for each step, and one for after the last.
    assert noted.lrs[-1] == pytest.approx(0.05 / (1 + len(lengths)))


@pytest.mark.parametrize("strategy", ["auto", "in_graph", "detached"])
@pytest.mark.parametrize("weigh", [None, "tokens"], ids=["alike", "weighted"])
@pytest.mark.parametrize("across", [False, True])
def test_data_whose_length_is_not_known(across: bool, weigh: str | None, strategy: str) -> None:
    """The last window turns out to be short after its first gradients have been made, or have left the device."""
    accumulation = GradientAccumulation(3, weigh=weigh, across_epochs=across)
    _, noted = fit(Ragged(OPTIMIZERS["ours"], stream=True), strategy, callbacks=[accumulation], max_epochs=2)
    windows = divided(ragged() * 2, *([3] * 5 + [1] if across else [3, 3, 2] * 2))
    assert_steps(noted, by_hand(windows, OPTIMIZERS["ours"], weighted=weigh is not None), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{"clip": "speculative"}, {"clip": "none"}, {"wait": "forward"}], ids=str)
def test_detached_in_every_way(options: dict[str, Any]) -> None:
    """Also where masters are updated before the backward pass has ended."""
    strategy = lightning_optim.strategies.DetachedStrategy(**options)
    accumulation = GradientAccumulation(3, weigh="tokens")
    run, noted = fit(Ragged(), strategy, callbacks=[accumulation], max_epochs=2)
    assert "gradients stay" not in run.strategy.report()
    assert_steps(noted, by_hand(divided(ragged() * 2, *[3, 3, 2] * 2), weighted=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("weigh", [None, "tokens"], ids=["alike", "weighted"])
def test_mixed_precisions(weigh: str | None, strategy: str) -> None:
    windows = divided(ragged(), 3, 3, 2)
    options: dict[str, Any] = {"gradient_clip_val": 2.0}
    accumulation = GradientAccumulation(3, weigh=weigh)
    _, noted = fit(Ragged(), strategy, callbacks=[accumulation], precision="bf16-mixed", **options)
    # In a shorter type, a window as one batch is summed in another order, which rounds otherwise.
    tolerance: dict[str, Any] = {"rtol": 2e-2, "atol": 2e-2} if weigh else CLOSE
    assert_steps(noted, by_hand(windows, weighted=weigh is not None, clip=2.0, cast=torch.bfloat16), **tolerance)
    options |= {"plugins": [scaled()], "callbacks": [GradientAccumulation(3, weigh=weigh)]}
    _, noted = fit(Ragged(), strategy, **options)
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if weigh else CLOSE
    assert_steps(noted, by_hand(windows, weighted=weigh is not None, clip=2.0, cast=torch.float16), **tolerance)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_window_that_overflows_is_left_out(strategy: str) -> None:
    model, plugin = Ragged(), scaled()
    model.overflows = {1}
    _, noted = fit(model, strategy, callbacks=[GradientAccumulation(3, weigh="tokens")], plugins=[plugin])
    initial = {f"net.{name}": p.detach() for name, p in network().named_parameters()}
    torch.testing.assert_close(noted.weights[2], initial, **EXACT)
    assert plugin.scaler.get_scale() == 128.0
    if strategy != "auto":  # Lightning's schedules step all the same
        windows = divided(ragged()[3:], 3, 2)
        expected = by_hand(windows, weighted=True, cast=torch.float16)
        assert_steps(noted, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_scaler_changes_nothing(strategy: str) -> None:
    """In float32 under a scaler (whose autocast is off), with weights of thousands of tokens."""

    def weigh(batch: Any) -> int:
        return 4096 * int(batch["tokens"])

    model = Ragged()
    model.net.register_forward_pre_hook(lambda *_: torch.set_autocast_enabled("cpu", False))
    plugin = scaled(init_scale=2.0**100)  # overflows, if multiplied by the weights
    _, noted = fit(model, strategy, callbacks=[GradientAccumulation(3, weigh=weigh)], plugins=[plugin])
    assert_steps(noted, by_hand(divided(ragged(), 3, 3, 2), weighted=True))
    assert plugin.scaler.get_scale() == 2.0**100


# ---------------------------------------------------------------- Lightning's own faults


def test_lightnings_last_window_is_divided_by_a_whole_ones_length() -> None:
    windows = divided(ragged(), 3, 3, 2)
    _, stock = fit(Ragged(), "auto", accumulate_grad_batches=3)
    with pytest.raises(AssertionError, match="not close"):
        assert_steps(stock, by_hand(windows, weighted=False), rtol=1e-2, atol=1e-2)
    _, ours = fit(Ragged(), "auto", callbacks=[GradientAccumulation(3)])
    assert_steps(ours, by_hand(windows, weighted=False))


def test_lightnings_estimate_under_its_scheduler() -> None:
    """The case of the reference: 200 steps are told for 150."""
    estimates = {}
    for cls in (GradientAccumulationScheduler, GradientAccumulation):
        model = Ragged(count=100)
        run, _ = fit(model, "auto", callbacks=[cls({0: 1, 1: 2})], max_epochs=2)
        assert run.global_step == 150
        estimates[cls.__name__] = model.estimated
    assert estimates == {"GradientAccumulationScheduler": 200, "GradientAccumulation": 150}


def test_lightnings_short_epochs() -> None:
    """An epoch shorter than a window steps at its end, and nothing is said."""
    run, _ = fit(Ragged(count=2), "auto", accumulate_grad_batches=4, max_epochs=4)
    assert run.global_step == 4
    with pytest.warns(LightningOptimWarning, match="an epoch has 2 batches, and a window 4: .* across_epochs=True"):
        run, _ = fit(Ragged(count=2), "auto", callbacks=[GradientAccumulation(4)], max_epochs=4)
    assert run.global_step == 4
    accumulation = GradientAccumulation(4, across_epochs=True)
    run, _ = fit(Ragged(count=2), "auto", callbacks=[accumulation], max_epochs=4)
    assert run.global_step == 2


def test_lightnings_tokens_do_not_count_alike() -> None:
    windows = divided(ragged(6), 3, 3)
    _, stock = fit(Ragged(count=6), "auto", accumulate_grad_batches=3)
    with pytest.raises(AssertionError, match="not close"):
        assert_steps(stock, by_hand(windows, weighted=True), rtol=1e-2, atol=1e-2)
    _, ours = fit(Ragged(count=6), "auto", callbacks=[GradientAccumulation(3, weigh="tokens")])
    assert_steps(ours, by_hand(windows, weighted=True))


def test_equal_windows_are_exactly_lightnings() -> None:
    for strategy in STRATEGIES:
        _, stock = fit(Ragged(count=6), strategy, accumulate_grad_batches=3, max_epochs=2)
        _, ours = fit(Ragged(count=6), strategy, callbacks=[GradientAccumulation(3)], max_epochs=2)
        for found, expected in zip(ours.weights, stock.weights, strict=True):
            torch.testing.assert_close(found, expected, **EXACT)
        assert ours.lrs == stock.lrs


# ---------------------------------------------------------------- batches that are left out


@pytest.mark.parametrize("strategy", ["auto", "in_graph", "detached"])
@pytest.mark.parametrize("weigh", [None, "tokens"], ids=["alike", "weighted"])
def test_batches_without_a_loss_do_not_count(weigh: str | None, strategy: str) -> None:
    model = Ragged()
    model.skipped = {0, 4, 7}
    _, noted = fit(model, strategy, callbacks=[GradientAccumulation(3, weigh=weigh)])
    data = ragged()
    windows = [data[1:3], [data[3], data[5]], [data[6]]]
    assert_steps(noted, by_hand(windows, weighted=weigh is not None))


@pytest.mark.parametrize("across", [False, True])
def test_the_rest_of_an_epoch_may_be_skipped(across: bool) -> None:
    class Stopping(Ragged):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 5 and self.current_epoch == 0 else None

        def configure_optimizers(self) -> Any:  # Lightning steps schedules after batches that are skipped
            return SGD(self.parameters())

    accumulation = GradientAccumulation(3, weigh="tokens", across_epochs=across)
    _, noted = fit(Stopping(), "auto", callbacks=[accumulation], max_epochs=2)
    data = ragged()
    seen = divided(data[:5] + data, 3, 3, 3, 3, 1) if across else [data[:3], *divided(data, 3, 3, 2)]
    assert_steps(noted, by_hand(seen, weighted=True, decays=False))


# ---------------------------------------------------------------- evaluations of the window


@pytest.mark.parametrize("strategy", ["in_graph", "detached", "optim_auto"])
@pytest.mark.parametrize("weigh", [None, "tokens"], ids=["alike", "weighted"])
@pytest.mark.parametrize("stream", [False, True])
def test_sam_is_that_of_the_window(stream: bool, weigh: str | None, strategy: str) -> None:
    _, noted = fit(Ragged(sam, stream=stream), strategy, callbacks=[GradientAccumulation(3, weigh=weigh)])
    net = network()
    optimizer = sam(net.parameters())
    expected = []
    for number, window in enumerate(divided(ragged(), 3, 3, 2), start=1):
        if weigh:
            window = [{key: torch.cat([batch[key] for batch in window]) for key in ("x", "y")}]
        for move in (optimizer.perturb, optimizer.restore):
            optimizer.zero_grad()
            for batch in window:
                (loss_of(net, batch) / len(window)).backward()
            move()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + number)
        expected.append({f"net.{name}": p.detach().clone() for name, p in net.named_parameters()})
    assert_steps(noted, expected, rtol=1e-5, atol=1e-5)


def test_a_line_search_is_over_the_window() -> None:
    make = partial(lightning_optim.LBFGS, lr=0.5, max_iter=3)
    _, noted = fit(Ragged(make), "in_graph", callbacks=[GradientAccumulation(3)])
    net = network()
    optimizer = make(net.parameters())
    expected = []
    for number, window in enumerate(divided(ragged(), 3, 3, 2), start=1):

        def closure(window: Any = window) -> Tensor:
            optimizer.zero_grad()
            losses = [loss_of(net, batch) / len(window) for batch in window]
            for loss in losses:
                loss.backward()
            return torch.stack([loss.detach() for loss in losses]).sum()

        optimizer.step(closure)
        optimizer.param_groups[0]["lr"] = 0.5 / (1 + number)
        expected.append({f"net.{name}": p.detach().clone() for name, p in net.named_parameters()})
    assert_steps(noted, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- schedules


def test_our_schedules_end_with_the_run() -> None:
    class Scheduled(Ragged):
        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters())
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Linear(optimizer), "interval": "step"}}

    for options in ({"windows": {0: 1, 2: 3}, "by": "step"}, {"windows": 5, "across_epochs": True}, {"windows": 3}):
        run, noted = fit(Scheduled(), "auto", callbacks=[GradientAccumulation(**options)], max_epochs=3)
        (config,) = run.lr_scheduler_configs
        assert config.scheduler.total_steps == run.global_step == config.scheduler.last_epoch
        assert noted.lrs[-1] == 0.0 < noted.lrs[-6]
