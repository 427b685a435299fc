"""``SpikeRollback`` under Lightning's own strategies; tests/strategies has it under ours, by their option ``undo=``."""

from __future__ import annotations

import math
import pickle
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from strategies.common import EXACT, OPTIMIZERS, ROOTS, Model, dataset, fit, known_warnings, make_trainer, scaled
from strategies.undoing import POLICY, Poisoned, Reference, assert_same_from, poisoned_class, reference_class
from torch import nn

from lightning_optim.callbacks.roots import callback_class
from lightning_optim.control.rollback.judged_steps import REPLACED
from lightning_optim.control.rollback.policy import LossSpikeError, UndoOptions, UndoPolicy
from lightning_optim.strategies import InGraphStrategy

pytestmark = known_warnings

SpikeRollback: Any = callback_class("SpikeRollback", "lightning.pytorch")

#: Batch 5 is poisoned, so that the step before it is undone.
CASES: dict[str, tuple[dict[str, Any], set[int], str]] = {
    "plain": ({}, {4, 5}, "auto"),
    "clip and accumulate": ({"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}, {2, 3, 4, 5}, "auto"),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {4, 5}, "auto"),
    "16-mixed": ({"plugins": scaled, "gradient_clip_val": 0.5}, {4, 5}, "auto"),
    "in graph": ({"gradient_clip_val": 0.5}, {4, 5}, "in_graph"),
    "detached": ({"gradient_clip_val": 0.5}, {4, 5}, "detached"),
}


def options_of(case: str) -> dict[str, Any]:
    """With plugins of their own for each run."""
    return {name: [scaled()] if value is scaled else value for name, value in CASES[case][0].items()}


@pytest.mark.parametrize("name", ["ours", "torch AdamW", "foreign"])
@pytest.mark.parametrize("value", [1e4, math.nan])
@pytest.mark.parametrize("case", CASES)
def test_a_spike(case: str, value: float, name: str) -> None:
    _, skip, strategy = CASES[case]
    rollback = SpikeRollback(**POLICY)
    run, found = fit(
        model := Poisoned(OPTIMIZERS[name], {5: value}), strategy, callbacks=[rollback], **options_of(case)
    )
    model_without = Reference(OPTIMIZERS[name], skip=skip, halve={5})
    stock, expected = fit(model_without, strategy, **options_of(case))
    assert_same_from(found, expected, 5)
    assert model.net[2].num_batches_tracked == 8 - len(skip)
    (record,) = rollback.records
    assert (record["action"], record["undone"], record["restored"], record["lr_scale"]) == ("undo", 1, True, 0.5)
    assert run.callback_metrics["undo/count"] == 1
    assert run.callback_metrics["undo/lr_scale"] == 0.5
    assert run.global_step == stock.global_step
    assert not set(REPLACED) & set(vars(run.strategy)), "the strategy has its own methods back"


@pytest.mark.parametrize("root", ROOTS)
def test_either_root(root: str) -> None:
    rollback = callback_class("SpikeRollback", root)(**POLICY)
    _, found = fit(poisoned_class(root)(OPTIMIZERS["ours"], {5: 1e4}), "auto", callbacks=[rollback])
    _, expected = fit(reference_class(root)(OPTIMIZERS["ours"], skip={4, 5}, halve={5}), "auto")
    assert_same_from(found, expected, 5)
    assert len(rollback.records) == 1


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """Also one that began with ``undo=`` of a strategy: the state is the same."""
    makes = {"callback": ("auto", [SpikeRollback(**POLICY)]), "option": (InGraphStrategy(undo=POLICY), [])}
    for name, (strategy, callbacks) in makes.items():
        first, _ = fit(Poisoned(OPTIMIZERS["foreign"], {5: 1e4}), strategy, callbacks=callbacks)
        first.save_checkpoint(tmp_path / f"{name}.ckpt")
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert "lightning_optim.Undo" in saved["callbacks"]
        rollback = SpikeRollback(**POLICY)
        options = {"callbacks": [rollback], "max_epochs": 2, "ckpt_path": tmp_path / f"{name}.ckpt"}
        fit(Poisoned(OPTIMIZERS["foreign"], {13: 1e4}), "auto", **options)
        assert [record["step"] for record in rollback.records] == [5, 13]
        assert rollback.judge.lr_scale == 0.25


def test_a_second_fit_and_one_that_fails() -> None:
    class Failing(Poisoned):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.number == 6 and self.trainer.current_epoch == 0:
                raise RuntimeError("on purpose")

    rollback = SpikeRollback(**POLICY)
    trainer = make_trainer(strategy="auto", callbacks=[rollback])
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(Failing(OPTIMIZERS["ours"], {5: 1e4}))
    assert not set(REPLACED) & set(vars(trainer.strategy))
    assert len(rollback.records) == 1
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Poisoned(OPTIMIZERS["ours"]))
    assert not set(REPLACED) & set(vars(trainer.strategy))
    deepcopy(trainer.callbacks)
    assert pickle.loads(pickle.dumps(rollback)).records == rollback.records  # noqa: S301 # of our own making


def test_a_copy_of_a_training_that_goes_on_judges_nothing() -> None:
    class Copying(Poisoned):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.number == 3:
                self.copied = deepcopy(self.trainer.strategy)

    fit(model := Copying(OPTIMIZERS["ours"], {5: 1e4}), "auto", callbacks=[SpikeRollback(**POLICY)])
    for name in REPLACED:
        assert getattr(model.copied, name).__func__ is getattr(type(model.copied), name)


@pytest.mark.parametrize("after_cap", ["stop", "raise"])
def test_after_the_last_undo(after_cap: Any) -> None:
    poison = {5: 1e4, 7: 1e4}
    rollback = SpikeRollback(**POLICY, max_undos=1, after_cap=after_cap)
    if after_cap == "raise":
        with pytest.raises(LossSpikeError):
            fit(Poisoned(OPTIMIZERS["ours"], poison), "auto", callbacks=[rollback])
    else:
        with pytest.warns(UserWarning, match=r"^SpikeRollback: "):
            run, _ = fit(Poisoned(OPTIMIZERS["ours"], poison), "auto", callbacks=[rollback], max_epochs=3)
        assert run.current_epoch < 3
    assert rollback.records[-1]["action"] == after_cap


def test_three_spikes_and_the_loss_at_the_end() -> None:
    """A loss times 1e4, a NaN gradient and an infinite weight: the end is that of a run that had none of them."""

    class Hurt(Poisoned):
        hurts = True

        def on_after_backward(self) -> None:
            if self.hurts and self.number == 40:
                next(self.parameters()).grad.fill_(math.nan)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.05)

        def on_train_batch_end(self, *_: Any) -> None:
            if self.hurts and self.number == 60:
                next(self.parameters()).data.view(-1)[0] = math.inf

    losses = []
    for hurts in (True, False):
        model = Hurt(None, {20: 1e4} if hurts else {}, batch=16)
        model.hurts, model.net = hurts, nn.Linear(6, 1)
        nn.init.zeros_(model.net.weight)
        rollback = SpikeRollback(**POLICY, recover_steps=10)
        fit(model, "auto", callbacks=[rollback], max_epochs=250)
        x, y = dataset().tensors
        losses.append(float(nn.functional.mse_loss(model.net(x), y).detach()))
        assert len(rollback.records) == (3 if hurts else 0)
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


# --- how it is asked for


def test_options_are_those_of_the_policy() -> None:
    assert set(UndoOptions.__annotations__) == set(asdict(UndoPolicy()))
    assert SpikeRollback().policy == UndoPolicy()
    with pytest.raises(TypeError, match="SpikeRollback has no option 'treshold'; valid: threshold"):
        SpikeRollback(treshold=6.0)
    with pytest.raises(ValueError, match="after_cap='pray'; valid: continue, stop, raise"):
        SpikeRollback(after_cap="pray")


def test_the_command_line(tmp_path: Path) -> None:
    common = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--model.make=null"]
    path = tmp_path / "config.yaml"
    path.write_text(
        "trainer:\n  callbacks:\n    - class_path: lightning_optim.callbacks.SpikeRollback\n"
        "      init_args:\n        threshold: 6\n        after_cap: stop\n"
    )
    flags = ["--trainer.callbacks+=lightning_optim.callbacks.SpikeRollback", "--trainer.callbacks.threshold=6"]
    for arguments in (["--config", str(path)], [*flags, "--trainer.callbacks.after_cap=stop"]):
        cli: Any = LightningCLI(Model, run=False, save_config_callback=None, args=[*common, *arguments])
        (rollback,) = (one for one in cli.trainer.callbacks if isinstance(one, SpikeRollback))
        assert rollback.policy == UndoPolicy(threshold=6.0, after_cap="stop")


class Manual(Model):
    def __init__(self, make: Any = None) -> None:
        super().__init__(make)
        self.automatic_optimization = False


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SpikeRollback with manual optimization.*valid: a Trainer without it"):
        fit(Manual(OPTIMIZERS["ours"]), "auto", callbacks=[SpikeRollback()])
    with pytest.raises(ValueError, match=r"SpikeRollback with undo= of the strategy.*valid: one of them"):
        fit(Model(OPTIMIZERS["ours"]), InGraphStrategy(undo=True), callbacks=[SpikeRollback()])
    with pytest.raises(ValueError, match="SpikeRollback with step_in_backward=True"):
        fit(Model(OPTIMIZERS["ours"]), InGraphStrategy(step_in_backward=True), callbacks=[SpikeRollback()])
    with pytest.raises(RuntimeError, match="state_key"):  # Lightning's own check
        make_trainer(callbacks=[SpikeRollback(), SpikeRollback()])


def test_without_spikes_it_changes_nothing() -> None:
    _, found = fit(Poisoned(OPTIMIZERS["torch AdamW"]), "auto", callbacks=[SpikeRollback(**POLICY)], max_epochs=2)
    _, expected = fit(Poisoned(OPTIMIZERS["torch AdamW"]), "auto", max_epochs=2)
    assert_same_from(found, expected, 0, **EXACT)
