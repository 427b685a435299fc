"""A guest in other people's programs: a Trainer that does not use this package is what it is without it."""

from __future__ import annotations

import logging
import pickle
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_optim
from lightning_optim.callbacks import joining

ROOTS = ["lightning.pytorch", "pytorch_lightning"]
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

both_roots = pytest.mark.parametrize("root", ROOTS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*num_workers",
    "ignore:.*log_every_n_steps",
    "ignore:.*engine cannot be used:lightning_optim.warnings.LightningOptimWarning",
)


def model_of(root: str, configure: Any = None, callbacks: Any = None) -> Any:
    """A model of a root of Lightning, whose optimizer, and callbacks, may be given."""

    class Model(import_module(root).LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).sum()

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.layer(batch)

        test_step = predict_step = validation_step

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1) if configure is None else configure(self.parameters())

        def configure_callbacks(self) -> Any:
            return callbacks or []

    return Model()


def data() -> Any:
    ones: Any = torch.ones(4, 1)
    return DataLoader(ones)


def trainer_of(root: str, **options: Any) -> Any:
    return import_module(root).Trainer(**{"max_epochs": 1, "accelerator": "cpu", **QUIET, **options})


def ours(trainer: Any) -> list[str]:
    modules = {type(callback).__name__: type(callback).__module__ for callback in trainer.callbacks}
    return [name for name, module in modules.items() if module.startswith("lightning_optim")]


@both_roots
def test_no_callback_is_added_and_the_order_is_the_users(root: str) -> None:
    lib = import_module(f"{root}.callbacks")
    checkpoints = [lib.ModelCheckpoint(monitor=name) for name in ("a", "b")]
    finder, stopping, monitor = lib.BatchSizeFinder(), lib.EarlyStopping(monitor="loss"), lib.LearningRateMonitor()
    assert trainer_of(root).callbacks == []
    given = [checkpoints[0], stopping, monitor, checkpoints[1]]
    trainer = trainer_of(root, callbacks=given, enable_checkpointing=True)
    assert trainer.callbacks == [stopping, monitor, *checkpoints]
    # What a model has to say of its own, as Lightning orders it.
    other = lib.EarlyStopping(monitor="b")
    model = model_of(root, callbacks=[checkpoints[1], other, finder])
    trainer = trainer_of(root, callbacks=[monitor, stopping])
    trainer.strategy.connect(model)
    trainer._callback_connector._attach_model_callbacks()
    assert trainer.callbacks == [finder, monitor, other, checkpoints[1]]


@both_roots
def test_no_stage_changes_the_list(root: str) -> None:
    seen: list[list[Any]] = []

    class Looker(import_module(root).Callback):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name.startswith(("on_", "setup", "teardown")):
                return lambda trainer, *args, **kwargs: seen.append(list(trainer.callbacks))
            return super().__getattribute__(name)

    class Attached(import_module(root).Callback):  # type: ignore[misc]
        pass

    model, attached = model_of(root), Attached()
    first, looker = import_module(root).Callback(), Looker()
    trainer = trainer_of(root, callbacks=[first, looker])
    before = trainer.callbacks
    for stage in ("fit", "validate", "test", "predict", "fit"):
        getattr(trainer, stage)(model, data())
        assert trainer.callbacks is before, stage
    assert all(callbacks == [first, looker] for callbacks in seen)
    assert len(seen) > 50
    # Calls after the first do not change what the model has added.
    adding = model_of(root, callbacks=[attached])
    for stage in ("fit", "validate", "fit"):
        getattr(trainer, stage)(adding, data())
        assert trainer.callbacks == [first, looker, attached], stage


@both_roots
def test_a_list_that_the_user_sets_is_the_list(root: str) -> None:
    trainer, model = trainer_of(root), model_of(root)
    trainer.fit(model, data())
    trainer.callbacks = [import_module(root).Callback()]
    mine = list(trainer.callbacks)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, data())
    assert trainer.callbacks == mine
    trainer.callbacks.clear()
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, data())
    assert trainer.callbacks == []


def scheduled(total: int | None) -> Any:
    def configure(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        return [optimizer], [{"scheduler": lightning_optim.Cosine(optimizer, total_steps=total), "interval": "step"}]

    return configure


def sam(parameters: Any) -> Any:
    return lightning_optim.SAM(parameters, lambda params: lightning_optim.SGD(params, lr=0.1))


@both_roots
@pytest.mark.parametrize(
    ("configure", "strategy", "expected"),
    [
        (lambda params: lightning_optim.AdamW(params), "auto", []),
        (lambda params: torch.optim.LBFGS(params), "auto", []),
        (scheduled(4), "auto", []),
        (scheduled(None), "auto", ["FillTotalSteps"]),
        (sam, "auto", ["RefuseWithoutReplay"]),
        (sam, "in_graph", []),
    ],
    ids=["our AdamW", "torch's LBFGS", "a schedule with its total", "a schedule without", "SAM", "SAM in_graph"],
)
def test_a_fit_gets_what_it_needs(root: str, configure: Any, strategy: str, expected: list[str]) -> None:
    first = import_module(root).Callback()
    trainer = trainer_of(root, strategy=strategy, callbacks=[first])
    model = model_of(root, configure)
    assert trainer.callbacks == [first]
    for epochs in (1, 2):  # once, however often it is needed
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(model, data())
        assert ours(trainer) == expected
        assert trainer.callbacks[-1] is first
        assert len(trainer.callbacks) == 1 + len(expected)


@both_roots
def test_one_that_the_user_has_added_comes_first_and_is_the_only_one(root: str) -> None:
    module = import_module(f"lightning_optim.callbacks{'' if 'lightning.' in root else '._pytorch_lightning'}")
    mine, first = module.FillTotalSteps(), import_module(root).Callback()
    trainer = trainer_of(root, callbacks=[first, mine])
    trainer.fit(model_of(root), data())
    assert trainer.callbacks == [first, mine]  # not needed
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model_of(root, scheduled(None)), data())
    assert trainer.callbacks == [mine, first]


def test_nothing_of_manual_optimization_is_looked_at() -> None:
    model = model_of(ROOTS[0], scheduled(None))
    model.automatic_optimization = False
    trainer = trainer_of(ROOTS[0])
    trainer.fit(model, data())
    assert trainer.callbacks == []


def test_no_fault_of_ours_ends_a_fit(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(trainer: Any) -> Any:
        raise RuntimeError("half an installation")

    monkeypatch.setattr(joining, "_needs", broken)
    with caplog.at_level(logging.WARNING, joining.__name__):
        trainer_of(ROOTS[0]).fit(model_of(ROOTS[0]), data())
    assert "adds no callbacks to this Trainer" in caplog.text
    assert "half an installation" in caplog.text


def test_a_lightning_that_calls_callbacks_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, joining.__name__):
        joining.wrap_calls(ModuleType("lightning.pytorch.trainer.call"))
    assert "callbacks=[FillTotalSteps(), RefuseWithoutReplay(), EvaluationWeights()]" in caplog.text


def test_it_is_done_once() -> None:
    call = import_module("lightning.pytorch.trainer.call")
    before = call._call_callback_hooks
    joining.wrap_calls(call)
    assert call._call_callback_hooks is before
    assert before.__name__ == "_call_callback_hooks"


def test_the_package_has_no_entry_points_into_lightning() -> None:
    """Installed, but not imported, it does nothing at all."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert not [group for group in project.get("entry-points", {}) if "lightning" in group]


def test_what_a_fit_has_got_pickles() -> None:
    trainer = trainer_of(ROOTS[0])
    trainer.fit(model_of(ROOTS[0], scheduled(None)), data())
    (callback,) = trainer.callbacks
    assert type(pickle.loads(pickle.dumps(callback))) is type(callback)  # noqa: S301
