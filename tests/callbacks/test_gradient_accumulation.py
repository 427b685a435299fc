"""``GradientAccumulation`` in Trainers: against loops by hand, against Lightning's own, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from strategies.common import CLOSE, EXACT, OPTIMIZERS, ROOTS, Model, fit, known_warnings, make_trainer, model_class, network
from strategies.common import scaled as scaler_plugin
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_optim
import lightning_optim.strategies  # noqa: F401 # makes the names known
from lightning_optim.callbacks import GradientAccumulation
from lightning_optim.callbacks.gradient_accumulation import Window
from lightning_optim.callbacks.roots import callback_class
from lightning_optim.control.accumulation import Accumulator
from lightning_optim.schedulers import Linear
from lightning_optim.warnings import LightningOptimWarning

pytestmark = [
    *known_warnings,
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*an epoch has . batches, and a window"),
]

STRATEGIES = ["auto", "in_graph", "detached", "optim_auto"]
SGD = partial(torch.optim.SGD, lr=0.05)


@pytest.fixture(autouse=True)
def _quiet(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_optim.warnings._seen", set())


def ragged(count: int = 8) -> list[dict[str, Any]]:
    """Batches of 1 to 7 tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = [1 + 3 * (i % 3) for i in range(count)]
    inputs = [torch.randn(n, 6, generator=generator) for n in tokens]
    return [{"x": x, "y": 3 * x.sin().sum(dim=1, keepdim=True), "tokens": len(x)} for x in inputs]


class Stream(IterableDataset[Any]):
    """Batches whose number is not known."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class Ragged(Model):  # type: ignore[misc, valid-type]
    """Trains on ragged batches, and notes what its steps are like."""

    def __init__(self, make: Any = SGD, count: int = 8, stream: bool = False) -> None:
        super().__init__(make)
        self.count, self.stream = count, stream
        self.estimated: Any = None
        self.skipped: set[int] = set()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        if batch_idx in self.skipped:
            return None
        loss = nn.functional.mse_loss(self.net(batch["x"]).float(), batch["y"])
        return loss * 1e30 if batch_idx in self.overflows else loss

    def train_dataloader(self) -> DataLoader[Any]:
        data = ragged(self.count)
        return DataLoader(Stream(data) if self.stream else data, batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        self.estimated = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


def by_hand(
    windows: list[list[dict[str, Any]]],
    make: Any = SGD,
    *,
    weighted: bool,
    clip: float | None = None,
    cast: Any = None,
    decays: bool = True,
) -> list[dict[str, Tensor]]:
    """The weights after each step of a plain loop; weighted: over whole windows as one batch."""
    net = network()
    optimizer = make(net.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    steps = []
    for window in windows:
        if weighted:
            window = [{key: torch.cat([batch[key] for batch in window]) for key in ("x", "y")}]
        for batch in window:
            with torch.autocast("cpu", cast, enabled=cast is not None):
                loss = nn.functional.mse_loss(net(batch["x"]).float(), batch["y"])
            (loss / len(window)).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        if decays:
            schedule.step()
        optimizer.zero_grad()
        steps.append({f"net.{name}": p.detach().clone() for name, p in net.named_parameters()})
    return steps


def divided(batches: list[Any], *lengths: int) -> list[list[Any]]:
    assert sum(lengths) == len(batches)
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    return [batches[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def assert_steps(noted: Any, expected: list[dict[str, Tensor]], **tolerance: Any) -> None:
    """The weights after each step, of those that were noted after each batch."""
    steps = [noted.weights[0]]
    for weights in noted.weights[1:]:
        if not all(torch.equal(weights[name], steps[-1][name]) for name in weights):
            steps.append(weights)
    initial = {f"net.{name}": p for name, p in network().named_parameters()}
    if all(torch.equal(steps[0][name], p) for name, p in initial.items()):
        steps = steps[1:]
    assert len(steps) == len(expected)
    for found, other in zip(steps, expected, strict=True):
        for name, value in other.items():
            torch.testing.assert_close(found[name], value, **tolerance or CLOSE)


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
    options |= {"plugins": [scaler_plugin()], "callbacks": [GradientAccumulation(3, weigh=weigh)]}
    _, noted = fit(Ragged(), strategy, **options)
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if weigh else CLOSE
    assert_steps(noted, by_hand(windows, weighted=weigh is not None, clip=2.0, cast=torch.float16), **tolerance)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_window_that_overflows_is_left_out(strategy: str) -> None:
    model, plugin = Ragged(), scaler_plugin()
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
    plugin = scaler_plugin(init_scale=2.0**100)  # overflows, if multiplied by the weights
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


def sam(params: Any) -> Any:
    return lightning_optim.SAM(params, partial(lightning_optim.SGD, lr=0.05), rho=0.1)


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
                (nn.functional.mse_loss(net(batch["x"]), batch["y"]) / len(window)).backward()
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
            losses = [nn.functional.mse_loss(net(batch["x"]), batch["y"]) / len(window) for batch in window]
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


# ---------------------------------------------------------------- resuming


class KeepAfter(Callback):
    """Saves a checkpoint after a batch, counted over all epochs."""

    def __init__(self, batch: int, path: Any) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.path)


class Resumable(Ragged):
    """With a loader that is resumed where it was; to ask for an estimate would set it up too early for that."""

    def configure_optimizers(self) -> Any:
        return Model.configure_optimizers(self)

    def train_dataloader(self) -> Any:
        class Loader:
            def __init__(self) -> None:
                self.next = 0

            def __len__(self) -> int:
                return 8

            def __iter__(self) -> Iterator[Any]:
                for self.next in range(self.next % 8 + 1, 9):
                    yield ragged()[self.next - 1]

            def state_dict(self) -> dict[str, int]:
                return {"next": self.next % 8}

            def load_state_dict(self, state: dict[str, int]) -> None:
                self.next = state["next"]

        return Loader()


@pytest.mark.parametrize("strategy", ["auto", "in_graph", "detached"])
@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({"windows": {0: 1, 2: 3}, "by": "step"}, 5),
        ({"windows": {0: 4, 1: 2}, "weigh": "tokens"}, 8),
        ({"windows": 3, "weigh": "tokens", "across_epochs": True}, 9),
        ({"windows": 2, "weigh": "tokens", "across_epochs": True}, 8),
    ],
    ids=str,
)
def test_resuming_between_windows_is_exact(options: dict[str, Any], batch: int, strategy: str, tmp_path: Any) -> None:
    path = tmp_path / "kept.ckpt"
    callbacks = [KeepAfter(batch, path), GradientAccumulation(**options)]
    whole, expected = fit(Resumable(OPTIMIZERS["ours"]), strategy, callbacks=callbacks, max_epochs=3)
    again = GradientAccumulation(**options)
    run, noted = fit(Resumable(OPTIMIZERS["ours"]), strategy, callbacks=[again], max_epochs=3, ckpt_path=path)
    assert run.global_step == whole.global_step
    assert len(noted.weights) == 24 - batch
    for found, other in zip(noted.weights, expected.weights[batch:], strict=True):
        torch.testing.assert_close(found, other, **EXACT)
    assert noted.lrs == expected.lrs[batch:]


@pytest.mark.parametrize("options", [{"windows": 3}, {"windows": 5, "across_epochs": True}], ids=str)
def test_resuming_in_a_window_steps_with_the_rest_of_it(options: dict[str, Any], tmp_path: Any) -> None:
    """Stock divides what is left by a whole window's length; ours by its own, and says so. Steps stay where they were."""
    path, across = tmp_path / "kept.ckpt", "across_epochs" in options
    batch, epochs = (8, 2) if across else (4, 1)
    callbacks = [KeepAfter(batch, path), GradientAccumulation(**options)]
    whole, expected = fit(Resumable(), "auto", callbacks=callbacks, max_epochs=epochs)
    callbacks = [GradientAccumulation(**options)]
    with pytest.warns(LightningOptimWarning, match=r"saved after . of the . batches of a window, and has no gradients"):
        run, noted = fit(Resumable(), "auto", callbacks=callbacks, max_epochs=epochs, ckpt_path=path)
    assert noted.lrs == expected.lrs[batch:]
    assert run.global_step == whole.global_step
    net = network()
    net.load_state_dict({k.removeprefix("net."): v for k, v in expected.weights[batch - 1].items()})
    left = ragged()[0:2] if across else ragged()[4:6]
    for one in left:
        (nn.functional.mse_loss(net(one["x"]), one["y"]) / 2).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None
        step = noted.lrs[0] * p.grad
        torch.testing.assert_close(noted.weights[1][f"net.{name}"], p.detach() - step, **CLOSE)


def test_lightnings_checkpoint_callback(tmp_path: Any) -> None:
    """It saves before any other callback of ours would have to be told: the state is that of the batch."""
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    accumulation = GradientAccumulation(3, weigh="tokens")
    fit(Ragged(), "auto", callbacks=[keeper, accumulation], enable_checkpointing=True)
    for path in tmp_path.glob("*.ckpt"):
        state = torch.load(path, weights_only=True)["callbacks"]["GradientAccumulation"]
        assert (state["position"], state["step"]) == (0, torch.load(path, weights_only=True)["global_step"])


# ---------------------------------------------------------------- before and after


def test_all_is_as_it_was_after_a_fit_and_a_second_fit_works() -> None:
    accumulation, model = GradientAccumulation(3, weigh="tokens", across_epochs=True), Ragged()
    trainer = make_trainer(strategy="in_graph", callbacks=[accumulation], max_epochs=2)
    cls, before = type(trainer), set(vars(trainer.fit_loop.epoch_loop))
    trainer.fit(model)
    first = copy.deepcopy(model.state_dict())
    assert trainer.accumulate_grad_batches == 1
    assert type(trainer.accumulate_grad_batches) is int
    assert type(trainer) is cls
    assert set(vars(trainer.fit_loop.epoch_loop)) == before
    assert "training_step" not in vars(model)
    assert pickle.loads(pickle.dumps(trainer.callbacks[0])).schedule == accumulation.schedule  # noqa: S301
    copy.deepcopy(trainer)
    again = Ragged()
    second = make_trainer(strategy="in_graph", callbacks=[accumulation], max_epochs=2)
    second.fit(again)
    torch.testing.assert_close(again.state_dict(), first, **EXACT)


def test_all_is_as_it_was_after_an_error() -> None:
    class Failing(Ragged):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 4 and self.fails:
                raise RuntimeError("no")
            return super().training_step(batch, batch_idx)

    accumulation, model = GradientAccumulation(3, across_epochs=True), Failing()
    model.fails = True
    trainer = make_trainer(callbacks=[accumulation])
    cls = type(trainer)
    with pytest.raises(RuntimeError, match="^no$"):
        trainer.fit(model)
    assert type(trainer.accumulate_grad_batches) is int
    assert type(trainer) is cls
    assert "training_step" not in vars(model)
    assert "_should_accumulate" not in vars(trainer.fit_loop.epoch_loop)
    model = Failing()
    model.fails = False
    _, noted = fit(model, "auto", callbacks=[accumulation])
    assert_steps(noted, by_hand(divided(ragged(), 3, 3, 2), weighted=False))


def test_a_trainer_is_copied_in_the_middle_of_a_fit() -> None:
    class Copying(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.copied = copy.deepcopy(pl_module)
            self.number = pickle.loads(pickle.dumps(trainer.accumulate_grad_batches))  # noqa: S301

    copying = Copying()
    fit(Ragged(), "auto", callbacks=[GradientAccumulation(3), copying])
    assert type(copying.number) is int


def test_a_window_as_a_modulus() -> None:
    window = Window(5, first=-2)
    assert [batch % window for batch in range(5)] == [2, 3, 4, 0, 1]
    assert (window, torch.tensor(10.0) / window, 7 % Window(3)) == (5, 2.0, 1)
    assert type(copy.deepcopy(window)) is int


@pytest.mark.parametrize("root", ROOTS)
def test_both_roots(root: str) -> None:
    pytest.importorskip(root)
    accumulation = callback_class("GradientAccumulation", root)(3)
    run, _ = fit(model_class(root)(), "in_graph", callbacks=[accumulation], max_epochs=2)
    assert run.global_step == 6


# ---------------------------------------------------------------- what is refused


class Manual(Ragged):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Iterating(Ragged):
    def training_step(self, dataloader_iter: Any) -> None:
        """Never called."""


def lbfgs(params: Any) -> Any:
    return torch.optim.LBFGS(params)


def refused() -> dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]]:
    scheduler = GradientAccumulationScheduler({0: 2})
    backward = lightning_optim.strategies.InGraphStrategy(step_in_backward=True)
    return {
        "manual": (Manual(), {"windows": 2}, {}, "manual optimization.*valid: lightning_optim.control.accumulation"),
        "Trainer": (Ragged(), {"windows": 2}, {"accumulate_grad_batches": 4}, r"accumulate_grad_batches=4\); valid: one"),
        "scheduler": (Ragged(), {"windows": 2}, {"callbacks": [scheduler]}, "another callback that accumulates; valid"),
        "backward": (Ragged(), {"windows": 2}, {"strategy": backward}, "step_in_backward=True.*valid: .*=False"),
        "iterator": (Iterating(), {"windows": 2}, {}, r"training_step\(dataloader_iter\).*valid: training_step"),
        "weighted search": (
            Ragged(lbfgs),
            {"windows": 2, "weigh": "tokens"},
            {"strategy": "in_graph"},
            "weigh='tokens' with LBFGS, whose line search.*valid: weigh=None",
        ),
        "search of the last": (Ragged(lbfgs), {"windows": 2}, {}, "2 batches with LBFGS under.*valid: strategy='in_graph'"),
        "search of a stream": (
            Ragged(lbfgs, stream=True),
            {"windows": 2},
            {"strategy": "in_graph"},
            "whose length is not known.*valid: limit_train_batches",
        ),
        "SAM": (Ragged(sam), {"windows": {1: 2}}, {}, "SAM under .*accumulate_grad_batches=2"),
    }


@pytest.mark.parametrize("case", refused())
def test_what_is_refused(case: str) -> None:
    model, windows, options, message = refused()[case]
    callbacks = [GradientAccumulation(**windows), *options.pop("callbacks", [])]
    options = {"strategy": "auto"} | options
    trainer = make_trainer(callbacks=callbacks, **options)
    with pytest.raises(ValueError, match=message):
        trainer.fit(model)
    assert type(trainer.accumulate_grad_batches) is int


def test_a_trainer_takes_one_of_them() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `GradientAccumulation`"):
        make_trainer(callbacks=[GradientAccumulation(2), GradientAccumulation(3)])


def test_options_are_checked_at_construction() -> None:
    with pytest.raises(ValueError, match=r"GradientAccumulation: windows=0; valid: a whole number >= 1"):
        GradientAccumulation(0)
    with pytest.raises(ValueError, match=r"GradientAccumulation: by='batch'; valid: epoch, step"):
        GradientAccumulation(2, by="batch")  # type: ignore[arg-type]


def test_a_missing_weight_stops_the_fit() -> None:
    with pytest.raises(ValueError, match="GradientAccumulation: weigh='words', and a batch has the keys 'x', 'y', 'to"):
        fit(Ragged(), "auto", callbacks=[GradientAccumulation(2, weigh="words")])


# ---------------------------------------------------------------- instead, and from the command line


def test_manual_optimization_with_the_accumulator() -> None:
    class ByItself(Manual):
        accumulator: Accumulator

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            self.accumulator.begin(epoch=self.current_epoch, left=self.trainer.num_training_batches - batch_idx)
            loss = nn.functional.mse_loss(self.net(batch["x"]), batch["y"])
            self.manual_backward(self.accumulator.share(loss, batch, self.parameters()))
            if self.accumulator.steps:
                self.optimizers().step()
                self.optimizers().zero_grad()
                self.lr_schedulers().step()

    for strategy in ("auto", "in_graph", "detached"):
        model = ByItself()
        model.accumulator = Accumulator(3, weigh="tokens")
        _, noted = fit(model, strategy)
        assert_steps(noted, by_hand(divided(ragged(), 3, 3, 2), weighted=True))


def weigh_batch(batch: dict[str, Any]) -> int:
    return int(batch["tokens"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["windows=4"], ({0: 4}, "epoch", None)),
        (["windows={0: 4, 10: 2}", "by=step", "weigh=tokens"], ({0: 4, 10: 2}, "step", "tokens")),
        ([f"weigh={__name__}.weigh_batch", "across_epochs=true"], ({0: 1}, "epoch", weigh_batch)),
    ],
    ids=str,
)
def test_flags(flags: list[str], expected: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr("sys.argv", ["fit"])
    arguments = ["--trainer.callbacks+=lightning_optim.callbacks.GradientAccumulation"]
    arguments += [f"--trainer.callbacks.{flag}" for flag in flags]
    cli = LightningCLI(Ragged, args=[*arguments, "--trainer.logger=false"], run=False)
    (found,) = (one for one in cli.trainer.callbacks if type(one).__name__ == "GradientAccumulation")
    assert (dict(found.schedule.lengths), found.schedule.by, found.accumulator.weigh) == expected
    assert found.schedule.across_epochs == ("across_epochs=true" in flags)


def test_a_wrong_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr("sys.argv", ["fit"])
    arguments = ["--trainer.callbacks+=lightning_optim.callbacks.GradientAccumulation"]
    with pytest.raises(SystemExit):
        LightningCLI(Ragged, args=[*arguments, "--trainer.callbacks.by=batch"], run=False)
    assert "epoch" in capsys.readouterr().err
