"""``GradientAccumulation`` over the life of a Trainer: checkpoints, second fits, errors, what is refused, flags."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from strategies.common import CLOSE, EXACT, OPTIMIZERS, ROOTS, Model, fit, make_trainer, model_class, network

import lightning_optim
from lightning_optim.callbacks import GradientAccumulation
from lightning_optim.callbacks.gradient_accumulation import Window
from lightning_optim.callbacks.roots import callback_class
from lightning_optim.control.accumulation import Accumulator
from lightning_optim.warnings import LightningOptimWarning

from .accumulation import Ragged, assert_steps, by_hand, divided, expected_warnings, lbfgs, loss_of, ragged, sam

pytestmark = expected_warnings


@pytest.fixture(autouse=True)
def _quiet(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_optim.warnings._seen", set())


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
                for index in range(self.next % 8, 8):
                    self.next = index + 1
                    yield ragged()[index]

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
    """Lightning divides what is left by a whole window's length. Here it is by its own; steps come where they did."""
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
        (loss_of(net, one) / 2).backward()
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
                raise RuntimeError("not this batch")
            return super().training_step(batch, batch_idx)

    accumulation, model = GradientAccumulation(3, across_epochs=True), Failing()
    model.fails = True
    trainer = make_trainer(callbacks=[accumulation])
    cls = type(trainer)
    with pytest.raises(RuntimeError, match="not this batch"):
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
    def training_step(self, dataloader_iter: Any) -> None:  # type: ignore[override]
        """Never called."""


def refused() -> dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]]:
    scheduler = GradientAccumulationScheduler({0: 2})
    backward = lightning_optim.strategies.InGraphStrategy(step_in_backward=True)
    return {
        "manual": (Manual(), {"windows": 2}, {}, "manual optimization.*valid: lightning_optim.control.accumulation"),
        "Trainer": (
            Ragged(),
            {"windows": 2},
            {"accumulate_grad_batches": 4},
            r"accumulate_grad_batches=4\); valid: one",
        ),
        "scheduler": (Ragged(), {"windows": 2}, {"callbacks": [scheduler]}, "another callback that accumulates; valid"),
        "backward": (Ragged(), {"windows": 2}, {"strategy": backward}, "step_in_backward=True.*valid: .*=False"),
        "iterator": (Iterating(), {"windows": 2}, {}, r"training_step\(dataloader_iter\).*valid: training_step"),
        "weighted search": (
            Ragged(lbfgs),
            {"windows": 2, "weigh": "tokens"},
            {"strategy": "in_graph"},
            "weigh='tokens' with LBFGS, whose line search.*valid: weigh=None",
        ),
        "search of the last": (
            Ragged(lbfgs),
            {"windows": 2},
            {},
            "2 batches with LBFGS under.*valid: strategy='in_graph'",
        ),
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
            loss = loss_of(self.net, batch)
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
    ids=["windows", "by step", "a function"],
)
def test_flags(flags: list[str], expected: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr("sys.argv", ["fit"])
    arguments = ["--trainer.callbacks+=lightning_optim.callbacks.GradientAccumulation"]
    arguments += [f"--trainer.callbacks.{flag}" for flag in flags]
    cli: Any = LightningCLI(Ragged, args=[*arguments, "--trainer.logger=false"], run=False)
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


def test_the_yaml_of_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lightning.pytorch.cli import LightningCLI

    page = Path(__file__).parents[2] / "docs" / "gradient_accumulation.md"
    (block,) = re.findall(r"^```yml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "block.yaml").write_text(block)
    monkeypatch.setattr("sys.argv", ["fit"])
    cli: Any = LightningCLI(
        Ragged, args=["--config", str(tmp_path / "block.yaml"), "--trainer.logger=false"], run=False
    )
    (found,) = (one for one in cli.trainer.callbacks if type(one).__name__ == "GradientAccumulation")
    assert dict(found.schedule.lengths) == {0: 1, 2000: 2, 6000: 4}
    assert (found.schedule.by, found.accumulator.weigh) == ("step", "tokens")
