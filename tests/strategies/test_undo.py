"""``undo``: a run with a spike is, bit for bit, the run without the steps that were undone, at half the rate."""

from __future__ import annotations

import math
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_optim
from lightning_optim.control.rollback import snapshots
from lightning_optim.control.rollback.policy import LossSpikeError, UndoPolicy
from lightning_optim.optimizers.sam import SAM
from lightning_optim.strategies import InGraphStrategy
from lightning_optim.warnings import LightningOptimWarning

from .common import EXACT, OPTIMIZERS, ROOTS, assert_same_steps, fit, known_warnings, make_trainer, scaled
from .undoing import POLICY, Poisoned, Reference, assert_same_from, poisoned_class, reference_class

pytestmark = known_warnings

MAKES: dict[str, Any] = OPTIMIZERS | {
    "SAM": lambda params: SAM(params, lambda inner: lightning_optim.AdamW(inner, lr=0.05)),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
}

#: Batch 5 is poisoned, so that the step before it is undone.
CASES: dict[str, tuple[dict[str, Any], set[int], set[int], int]] = {
    "plain": ({}, {4, 5}, {5}, 5),
    "clip": ({"gradient_clip_val": 0.5}, {4, 5}, {5}, 5),
    "clip by value": ({"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, {4, 5}, {5}, 5),
    "clip and accumulate": ({"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}, {2, 3, 4, 5}, {5}, 5),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {4, 5}, {5}, 5),
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


def in_graph(**policy: Any) -> InGraphStrategy:
    return InGraphStrategy(undo=POLICY | policy)


@pytest.mark.matrix(unless=lambda name, value: name in ("ours", "foreign") or (name == "SAM" and value == 1e4))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("value", [1e4, math.nan])
def test_a_spike(name: str, case: str, value: float) -> None:
    options, skip, halve, batch = CASES[case]
    if name == "SAM" and case == "clip by value":
        options = {}  # is refused
    run, found = fit(model := Poisoned(MAKES[name], {5: value}), in_graph(), **options)
    _, expected = fit(reference := Reference(MAKES[name], skip=skip, halve=halve), "in_graph", **options)
    assert_same_from(found, expected, batch)
    # The statistics of batch norm have seen none of those batches.
    assert model.net[2].num_batches_tracked == 8 - len(skip)
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), reference.buffers(), strict=True))
    (record,) = run.strategy.undo_records
    assert (record["action"], record["undone"], record["restored"], record["lr_scale"]) == ("undo", 1, True, 0.5)
    assert record["step"] == 5 // options.get("accumulate_grad_batches", 1)
    assert run.callback_metrics["undo/count"] == 1
    assert run.callback_metrics["undo/lr_scale"] == 0.5
    assert run.global_step == 8 // options.get("accumulate_grad_batches", 1)


@pytest.mark.parametrize("name", ["ours", "torch AdamW", "foreign"])
def test_a_spike_with_a_loss_scale(name: str) -> None:
    run, found = fit(Poisoned(MAKES[name], {5: 1e4}), in_graph(), plugins=[scaled()])
    stock, expected = fit(Reference(MAKES[name], skip={4, 5}, halve={5}), "in_graph", plugins=[scaled()])
    assert_same_from(found, expected, 5)
    # The scale stays as it is, and so does the count of steps since it changed: undone steps were fine by that.
    here, there = run.precision_plugin.state_dict(), stock.precision_plugin.state_dict()
    assert here["scale"] == there["scale"]
    assert len(run.strategy.undo_records) == 1


@pytest.mark.parametrize("name", ["ours", "foreign"])
def test_a_step_that_the_scaler_leaves_out_is_no_spike(name: str) -> None:
    run, found = fit(Poisoned(MAKES[name]), in_graph(), plugins=[scaled(init_scale=2.0**18)])
    stock, expected = fit(Poisoned(MAKES[name]), "in_graph", plugins=[scaled(init_scale=2.0**18)])
    assert_same_steps(found, expected, **EXACT)
    assert run.strategy.undo_records == []
    state = run.precision_plugin.state_dict()
    assert state == stock.precision_plugin.state_dict()
    assert state["scale"] < 2.0**18


class Blown(Poisoned):
    """The gradient of batch 4 is a million times too large: its loss is fine, the next one is not."""

    def on_after_backward(self) -> None:
        if self.number == 4:
            for p in self.parameters():
                p.grad.mul_(1e6)


@pytest.mark.parametrize("root", ROOTS)
def test_a_bad_step(root: str) -> None:
    blown = type("BlownOfRoot", (poisoned_class(root),), {"on_after_backward": Blown.on_after_backward})
    home = "lightning" if root == "lightning.pytorch" else "pytorch_lightning"
    strategy = import_module(f"lightning_optim.strategies.{home}").InGraphStrategy(undo=POLICY)
    run, found = fit(blown(MAKES["SGD"]), strategy)
    _, expected = fit(reference_class(root)(MAKES["SGD"], skip={4, 5}, halve={5}), "in_graph")
    assert_same_from(found, expected, 5)
    assert run.strategy.undo_records[0]["step"] == 5


def test_the_loss_of_a_window_is_that_of_all_its_batches() -> None:
    run, found = fit(Poisoned(MAKES["ours"], {4: 1e4}), in_graph(), accumulate_grad_batches=2)
    _, expected = fit(Reference(MAKES["ours"], skip={2, 3, 4, 5}, halve={5}), "in_graph", accumulate_grad_batches=2)
    assert_same_from(found, expected, 5)
    assert run.strategy.undo_records[0]["loss"] == pytest.approx(1e8 / 2, rel=0.01)


def test_the_step_waits_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which here takes ten times as long as a batch: a step before its end would be part of it."""
    stock, threads = snapshots._copy, set[threading.Thread]()

    def slow(to: list[Tensor], of: list[Tensor]) -> None:
        threads.add(threading.current_thread())
        time.sleep(0.05)
        stock(to, of)

    monkeypatch.setattr(snapshots, "_copy", slow)
    _, found = fit(Poisoned(MAKES["ours"], {5: 1e4}), in_graph())
    assert len(threads) == 2
    _, expected = fit(Reference(MAKES["ours"], skip={4, 5}, halve={5}), "in_graph")
    assert_same_from(found, expected, 5)


def test_without_spikes_it_is_as_without_undo() -> None:
    for options in ({}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}):
        _, found = fit(Poisoned(MAKES["ours"]), in_graph(), max_epochs=2, **options)
        _, expected = fit(Poisoned(MAKES["ours"]), "in_graph", max_epochs=2, **options)
        assert_same_steps(found, expected, **EXACT)


def test_several_spikes_up_to_the_cap() -> None:
    poisoned = {3: 1e4, 5: 1e4, 6: 1e4, 7: 0.0}
    with pytest.warns(LightningOptimWarning, match="max_undos=2 is reached: nothing is undone any more"):
        run, found = fit(Poisoned(MAKES["ours"], poisoned), in_graph(max_undos=2))
    assert [record["action"] for record in run.strategy.undo_records] == ["undo", "undo", "step"]

    class SpikesAtLast(Reference):
        def __init__(self) -> None:
            super().__init__(MAKES["ours"], skip={2, 3, 4, 5}, halve={3, 5})
            self.poisoned = poisoned

    _, expected = fit(SpikesAtLast(), "in_graph")
    assert_same_from(found, expected, 5)


def test_the_end_of_the_run_as_an_answer() -> None:
    with pytest.warns(LightningOptimWarning, match="max_undos=1 is reached: after_cap='stop'"):
        run, found = fit(Poisoned(MAKES["ours"], {3: 1e4, 6: math.nan}), in_graph(max_undos=1, after_cap="stop"))
    assert len(found.weights) == 7
    _, expected = fit(Reference(MAKES["ours"], skip={2, 3, 5, 6}, halve={3}), "in_graph", max_steps=7)
    assert_same_from(found, expected, 6)
    assert run.strategy.undo_records[-1]["action"] == "stop"


def test_an_error_as_an_answer() -> None:
    with pytest.raises(LossSpikeError, match=r"the loss is nan.*max_undos=1 is reached: after_cap='raise'"):
        fit(Poisoned(MAKES["ours"], {3: 1e4, 6: math.nan}), in_graph(max_undos=1, after_cap="raise"))


def test_the_learning_rate_returns() -> None:
    run, found = fit(Poisoned(MAKES["ours"], {3: 1e4}), in_graph(recover_steps=2), max_epochs=2)
    assert run.strategy.undo_records[0]["lr_scale"] == 0.5
    assert run.callback_metrics["undo/lr_scale"] == 1.0
    expected = [0.05 / (1 + done) for done in range(1, 17)]
    assert found.lrs[:3] == expected[:3]
    assert found.lrs[3] == pytest.approx(expected[3] / 2)
    assert found.lrs[6:] == pytest.approx(expected[6:])


@pytest.mark.parametrize("where", ["device", "host"])
def test_a_policy_as_it_is(where: Any) -> None:
    run, found = fit(Poisoned(MAKES["ours"], {5: 1e4}), InGraphStrategy(undo=UndoPolicy(**POLICY, snapshots=where)))
    assert len(run.strategy.undo_records) == 1
    _, expected = fit(Reference(MAKES["ours"], skip={4, 5}, halve={5}), "in_graph")
    assert_same_from(found, expected, 5)


# --- checkpoints


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("poisoned", [{5: 1e4, 11: 1e4}, {7: 1e4, 12: math.nan}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(root: str, poisoned: dict[int, float], tmp_path: Path) -> None:
    home = "lightning" if root == "lightning.pytorch" else "pytorch_lightning"
    cls = import_module(f"lightning_optim.strategies.{home}").InGraphStrategy
    model, policy = poisoned_class(root), POLICY | {"max_undos": 2, "recover_steps": 20}
    whole, expected = fit(model(MAKES["ours"], poisoned), cls(undo=policy), max_epochs=2)
    half, _ = fit(model(MAKES["ours"], poisoned), cls(undo=policy), max_epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["callbacks"]["lightning_optim.Undo"]["count"] == 1
    rest, found = fit(model(MAKES["ours"], poisoned), cls(undo=policy), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert rest.strategy.undo_records == whole.strategy.undo_records
    assert len(rest.strategy.undo_records) == 2
    expected.weights, expected.lrs = expected.weights[8:], expected.lrs[8:]
    assert_same_steps(found, expected, **EXACT)


def test_a_step_before_the_checkpoint_cannot_be_undone_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, _ = fit(Poisoned(MAKES["ours"]), in_graph())
    half.save_checkpoint(tmp_path / "half.ckpt")
    said: list[str] = []
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero.rank_zero_info", said.append)
    rest, found = fit(Poisoned(MAKES["ours"], {8: 1e4}), in_graph(), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert "the weights stay, as there is no snapshot (the run was resumed" in said[-1]
    (record,) = rest.strategy.undo_records
    assert (record["step"], record["lr_scale"], record["restored"]) == (8, 0.5, False)
    weights = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in found.weights[0].items())


def test_checkpoints_go_to_and_from_other_strategies(tmp_path: Path) -> None:
    for first, second in ((in_graph(), "auto"), ("auto", in_graph())):
        half, _ = fit(Poisoned(MAKES["foreign"]), first)
        half.save_checkpoint(tmp_path / "half.ckpt")
        path = tmp_path / "half.ckpt"
        with pytest.warns() as warned:
            _, found = fit(Poisoned(MAKES["foreign"]), second, max_epochs=2, ckpt_path=path)
        # Lightning's own words on a callback that is not there.
        assert any("lightning_optim.Undo" in str(one.message) for one in warned) == (second == "auto")
        _, expected = fit(Poisoned(MAKES["foreign"]), "auto", max_epochs=2)
        expected.weights, expected.lrs = expected.weights[8:], expected.lrs[8:]
        assert_same_steps(found, expected, **EXACT)


def test_a_second_fit_of_the_same_trainer_has_one_record() -> None:
    trainer = make_trainer(strategy=in_graph())
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(Poisoned(MAKES["ours"], {5: 1e4}))
    assert [type(callback).__name__ for callback in trainer.callbacks].count("SpikeRollback") == 1
    assert len(trainer.strategy.undo_records) == 1


def test_an_optimizer_that_is_replaced_on_the_way() -> None:
    """Its first step has nothing before it, and later ones are undone as ever."""

    def replacing(cls: Any) -> Any:
        class Replacing(cls):
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                if self.number == 2:
                    optimizer = MAKES["ours"](self.parameters())
                    (config,) = self.trainer.lr_scheduler_configs
                    config.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
                    self.trainer.optimizers = [optimizer]

        return Replacing

    run, found = fit(replacing(Poisoned)(MAKES["torch SGD"], {5: 1e4}), in_graph())
    _, expected = fit(replacing(Reference)(MAKES["torch SGD"], skip={4, 5}, halve={5}), "in_graph")
    assert_same_from(found, expected, 5)
    assert run.strategy.undo_records[0]["restored"]


def test_tuners_are_left_alone() -> None:
    """A learning rate finder drives the loss up on purpose."""
    from lightning.pytorch.tuner import Tuner

    class Tuned(Poisoned):
        lr = 1e-3

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    losses = []
    for strategy in (in_graph(min_ratio=1.1, warmup_steps=1), "in_graph"):
        trainer = make_trainer(strategy=strategy)
        finder = Tuner(trainer).lr_find(Tuned(), num_training=8, min_lr=1e-3, max_lr=1e3, early_stop_threshold=None)
        assert finder is not None
        losses.append(finder.results["loss"])
    assert losses[0] == losses[1]
    assert max(losses[0]) > 10 * losses[0][0]


def test_two_spikes_of_a_model_that_searches_along_a_line(tmp_path: Path) -> None:
    """torch's L-BFGS evaluates the window several times: the first loss is the one that is judged."""

    def make(params: Any) -> Any:
        return torch.optim.LBFGS(params, lr=0.1, max_iter=3, history_size=2)

    class Evaluations(Poisoned):
        count = 0

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            self.count += 1
            return super().training_step(batch, batch_idx)

    model = Evaluations(make, {5: 1e4})
    run, found = fit(model, in_graph())
    assert model.count > 8
    assert len(run.strategy.undo_records) == 1
    _, expected = fit(Reference(make, skip={4, 5}, halve={5}), "in_graph")
    assert_same_from(found, expected, 5)
