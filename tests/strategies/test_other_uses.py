"""What users do with a Trainer besides one fit: as with Lightning's own strategies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from interrupting import Interrupt, ours
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor

import lightning_optim
from lightning_optim.strategies import InGraphStrategy

from .common import CLOSE, Model, known_warnings, make_trainer

pytestmark = [
    *known_warnings,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*other parameters are trained than before"),
    pytest.mark.filterwarnings("ignore:.*Trainer.fit. stopped"),
]

adamw = partial(lightning_optim.AdamW, lr=0.03)
MAKES: dict[str, Any] = {
    "AdamW": adamw,
    "SAM": partial(lightning_optim.SAM, base=adamw),
    "LBFGS": lightning_optim.LBFGS,
    "torch AdamW": partial(torch.optim.AdamW, lr=0.03),
}


class Plain(Model):
    """Without a schedule; raises at a batch, once."""

    raises_at: int | None = None

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if batch_idx == self.raises_at:
            self.raises_at = None
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test", super().training_step(batch, batch_idx))

    def test_dataloader(self) -> Any:
        return self.train_dataloader()

    def configure_optimizers(self) -> Any:
        return self.make([p for p in self.parameters() if p.requires_grad])


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.02)


class Reordering(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        if trainer.current_epoch == 1:
            groups.reverse()
        if trainer.current_epoch == 2:
            del groups[0]


class Copying(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            duplicates(trainer)


def duplicates(trainer: Any) -> tuple[Any, Any]:
    pickle.loads(pickle.dumps(trainer.optimizers[0]))  # noqa: S301
    copy.deepcopy(trainer.optimizers[0])
    copy.deepcopy(trainer.strategy.precision_plugin)
    return copy.deepcopy(trainer.lightning_module), trainer


def twice(model: Any, trainer: Any) -> None:
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)


def after_an_error(model: Any, trainer: Any) -> None:
    model.raises_at = 3
    with pytest.raises(ZeroDivisionError):
        trainer.fit(model)
    trainer.fit(model)


def after_a_test(model: Any, trainer: Any) -> None:
    trainer.test(model, verbose=False)
    trainer.fit(model)
    trainer.test(model, verbose=False)


def with_callback(callback: Callback, model: Any, trainer: Any) -> None:
    trainer.callbacks.append(callback)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model)


def split(model: Any) -> Any:
    model.configure_optimizers = lambda: model.make(
        [{"params": list(model.net[0].parameters())}, {"params": list(model.net[1:].parameters()), "lr": 0.01}]
    )
    return model


def copied_at_the_end(model: Any, trainer: Any) -> None:
    trainer.fit(model)
    pickle.loads(pickle.dumps(copy.deepcopy(trainer.strategy)))  # noqa: S301
    other = copy.deepcopy(trainer)
    other.fit_loop.max_epochs = 2
    other.fit(other.lightning_module)
    model.load_state_dict(other.lightning_module.state_dict())


USES: dict[str, Callable[[Any, Any], None]] = {
    "twice": twice,
    "after an error": after_an_error,
    "after a test": after_a_test,
    "unfreezing": lambda model, trainer: with_callback(Unfreezing(), model, trainer),
    "reordering": lambda model, trainer: with_callback(Reordering(), split(model), trainer),
    "copying": lambda model, trainer: with_callback(Copying(), model, trainer),
    "copied": copied_at_the_end,
}


@pytest.mark.parametrize(
    ("name", "use"),
    [
        *(("AdamW", use) for use in USES),
        *(("SAM", use) for use in USES if use != "after a test"),
        *(
            (name, use)
            for name in ("LBFGS", "torch AdamW")
            for use in ("unfreezing", "reordering", "copying", "copied")
        ),
    ],
)
def test_as_with_lightnings_own(name: str, use: str) -> None:
    found = []
    for strategy in ("in_graph", "auto"):
        model = Plain(MAKES[name], batch=4)
        USES[use](model, make_trainer(strategy=strategy))
        found.append(list(model.parameters()))
    for ours_, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours_, theirs, **CLOSE if name != "LBFGS" else {"rtol": 1e-4, "atol": 1e-4})


@pytest.mark.parametrize("how", [{"undo": True}, {"step_in_backward": True}])
@pytest.mark.parametrize("use", ["twice", "after an error", "unfreezing", "reordering", "copying"])
def test_with_options(use: str, how: dict[str, Any]) -> None:
    found = []
    for strategy in (InGraphStrategy(**how), "auto"):
        model = Plain(adamw, batch=4)
        USES[use](model, make_trainer(strategy=strategy))
        found.append(list(model.parameters()))
    for ours_, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours_, theirs, **CLOSE)


@pytest.mark.parametrize("name", ["SAM", "LBFGS"])
def test_a_window_that_is_interrupted(name: str) -> None:
    """At a sample of the calls: the weights are those before the step or after it, and the next fit goes on."""

    class Watching(Callback):
        def __init__(self, interrupt: Interrupt | None) -> None:
            self.interrupt = interrupt
            self.weights: list[list[Tensor]] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.weights.append([p.detach().clone() for p in pl_module.parameters()])
            if batch_idx == 2 and self.interrupt is not None:
                self.interrupt.begin()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if self.interrupt is not None:
                self.interrupt.end()

    whole = Watching(None)
    make_trainer(strategy="in_graph", callbacks=[whole]).fit(Plain(MAKES[name], batch=4))
    interrupted = 0
    for number in range(0, 100000, 41 if name == "SAM" else 173):
        model, watching = Plain(MAKES[name], batch=4), Watching(interrupt := Interrupt(number, ours))
        interrupt.run(lambda: make_trainer(strategy="in_graph", callbacks=[watching]).fit(model))  # noqa: B023
        if not interrupt.raised:
            break
        if watching.weights[3:]:
            continue  # Python has ignored it
        interrupted += 1
        now = list(model.parameters())
        assert any(all(torch.equal(a, b) for a, b in zip(now, known, strict=True)) for known in whole.weights[2:4]), (
            number
        )
        make_trainer(strategy="in_graph").fit(model)
        assert all(p.isfinite().all() for p in model.parameters())
    assert interrupted > 3
