"""Detached runs in which something happens: a layer is unfrozen, gradients are dropped, a fit fails, all is copied."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor

import lightning_optim
from lightning_optim.strategies import DetachedStrategy, OptimAutoStrategy

from .common import Model, assert_same_steps, fit, known_warnings, make_trainer

pytestmark = known_warnings


class Unfreezes(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=1e-3)
        pl_module.net[0].requires_grad_(epoch >= 1)  # Lightning puts the group back, but leaves it frozen


def _model() -> Any:
    model = Model()
    model.configure_optimizers = lambda: lightning_optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2
    )
    return model


def test_a_group_that_was_added_comes_back_with_its_masters(tmp_path: Path) -> None:
    options: dict[str, Any] = {"precision": "bf16-true"}
    saved, _ = fit(_model(), "detached", callbacks=[Unfreezes()], max_epochs=2, **options)
    saved.save_checkpoint(tmp_path / "half")
    _, whole = fit(_model(), "detached", callbacks=[Unfreezes()], max_epochs=4, **options)
    _, resumed = fit(
        _model(), "detached", callbacks=[Unfreezes()], max_epochs=4, ckpt_path=tmp_path / "half", **options
    )
    whole.weights, whole.lrs = whole.weights[16:], whole.lrs[16:]
    assert_same_steps(resumed, whole, rtol=0, atol=0)


class Drops(Callback):
    """Forgets gradients in the middle of a window, where Lightning itself would not."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in (1, 4):
            if self.how == "module":
                pl_module.zero_grad()
            elif self.how == "optimizer":
                trainer.optimizers[0].zero_grad()
            else:
                for p in pl_module.parameters():
                    p.grad = None


@pytest.mark.parametrize("how", ["module", "optimizer", "None"])
@pytest.mark.parametrize("strategy", ["detached", "optim_auto"])
def test_gradients_that_a_hook_drops_are_dropped(strategy: str, how: str) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5}
    _, expected = fit(Model(), "auto", callbacks=[Drops(how)], **options)
    _, found = fit(Model(), strategy, callbacks=[Drops(how)], **options)
    assert_same_steps(found, expected)


@pytest.mark.parametrize("strategy", [lambda: DetachedStrategy(wait="forward", undo=True), OptimAutoStrategy])
def test_what_was_trained_can_be_copied_and_pickled(strategy: Any) -> None:
    class During(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            for thing in (pl_module, trainer.optimizers[0], trainer.strategy):
                copy.deepcopy(thing)

    model = Model()
    model.configure_optimizers = lambda: lightning_optim.AdamW(model.parameters(), lr=0.01)
    trainer, _ = fit(model, strategy(), callbacks=[During()], precision="bf16-true", accumulate_grad_batches=2)
    copy.deepcopy(trainer)
    copy.deepcopy(trainer.strategy)
    pickle.dumps(trainer.optimizers[0])
    strategy = copy.copy(trainer.strategy)
    strategy._model = strategy._lightning_module = None  # a class of these tests, which does not pickle
    pickle.dumps(strategy)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)  # and goes on
    assert trainer.global_step == 8


def test_a_fit_that_fails_and_one_more() -> None:
    class Fails(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                raise RuntimeError("on purpose")

    model, strategy = Model(), DetachedStrategy(clip="speculative")
    trainer = make_trainer(strategy=strategy, callbacks=[Fails()])
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.fit(model)
    trainer = make_trainer(strategy=DetachedStrategy(clip="speculative"))
    trainer.fit(model)
    assert trainer.global_step == 8


MASTERS: dict[str, tuple[Any, str]] = {
    "shape": (torch.zeros(3), r"detached_masters\['net.0.bias'\] is of shape \(3,\); valid: \(7,\)"),
    "type": (torch.zeros(7, dtype=torch.int64), r"\['net.0.bias'\] is of torch.int64; valid: float32"),
    "complex": (torch.zeros(7, dtype=torch.complex64), r"\['net.0.bias'\] is of torch.complex64"),
    "meta": (torch.zeros(7, device="meta"), r"\['net.0.bias'\] is of layout torch.strided on meta"),
    "sparse": (torch.zeros(7).to_sparse(), r"\['net.0.bias'\] is of layout torch.sparse_coo"),
    "number": (1.0, r"\['net.0.bias'\] is a float; valid: a tensor"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    trainer, _ = fit(Model(), "detached", precision="bf16-true")
    trainer.save_checkpoint(path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


@pytest.mark.parametrize("what", [*MASTERS, "no list", "too many", "no dict"])
def test_masters_that_cannot_be_are_refused_by_name(what: str, saved: dict[str, Any], tmp_path: Path) -> None:
    given = copy.copy(saved)
    masters: list[dict[str, Tensor]] = [dict(saved["detached_masters"][0])]
    if what in MASTERS:
        masters[0]["net.0.bias"], message = MASTERS[what]
        given["detached_masters"] = masters
    elif what == "no list":
        given["detached_masters"], message = 3, "detached_masters are int; valid: one dict for each of 1 optimizers"
    elif what == "too many":
        given["detached_masters"], message = masters * 2, "detached_masters are 2 entries"
    else:
        given["detached_masters"], message = [[]], "detached_masters have a list; valid: dicts"
    torch.save(given, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=message):
        fit(Model(), "detached", precision="bf16-true", max_epochs=2, ckpt_path=tmp_path / "checkpoint")


def test_masters_in_another_order_are_matched_by_name(saved: dict[str, Any], tmp_path: Path) -> None:
    ends = []
    for reverse in (False, True):
        given = copy.copy(saved)
        items = list(saved["detached_masters"][0].items())
        given["detached_masters"] = [dict(items[::-1] if reverse else items)]
        torch.save(given, tmp_path / "checkpoint")
        _, run = fit(Model(), "detached", precision="bf16-true", max_epochs=2, ckpt_path=tmp_path / "checkpoint")
        ends.append(run)
    assert_same_steps(*ends, rtol=0, atol=0)
