"""``LRFinder`` and what is around it: loaders, callbacks, loggers, manual optimization, failures, what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers.logger import DummyLogger
from strategies.common import known_warnings, make_trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import lightning_optim
from lightning_optim.callbacks import LRFinder
from lightning_optim.control.lr_finder import RangeTest
from lightning_optim.strategies import DetachedStrategy, InGraphStrategy
from lightning_optim.warnings import LightningOptimWarning

from .range_tests import QUICK, Restless, assert_identical, data, left_behind, run

pytestmark = known_warnings


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


# ---------------------------------------------------------------- data, callbacks, loggers


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_keep_their_place(workers: int) -> None:
    generator = torch.Generator().manual_seed(5)
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": bool(workers)}
    if workers:
        options["multiprocessing_context"] = "fork"

    def once(finder: LRFinder | None) -> Any:
        own = torch.Generator()
        own.set_state(generator.get_state())
        result = left_behind(*run(Restless(generator=own, **options), "auto", finder, max_epochs=2))
        return result, own.get_state()

    assert_identical(once(LRFinder(apply=False, at_epochs=[0, 1], **QUICK)), once(None))


class Resumable:
    """A loader that knows its place, and tells it to checkpoints."""

    def __init__(self) -> None:
        self.batches, self.place = list(DataLoader(data(), batch_size=3)), 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for place, batch in enumerate(self.batches, 1):
            self.place = place
            yield batch


class Once(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return torch.ones(6), torch.ones(1)


def test_other_loaders(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(finder: LRFinder | None) -> Any:
        loader, model = Resumable(), Restless()
        monkeypatch.setattr(model, "train_dataloader", lambda: loader)
        return left_behind(*run(model, "auto", finder, max_epochs=2)), loader.place

    assert_identical(once(LRFinder(apply=False, at_epochs=[0, 1], **QUICK)), once(None))
    model = Restless()
    monkeypatch.setattr(model, "train_dataloader", lambda: DataLoader(Once(), batch_size=4))
    with pytest.raises(TypeError, match="the training data is a Once, an iterator, which a range test would use up"):
        run(model, "auto", LRFinder(**QUICK), limit_train_batches=3)


class Stream(IterableDataset[Any]):
    """Never ends, and is another one each time."""

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(int(torch.randint(1000, ())))
        while True:
            yield torch.randn(6, generator=generator), torch.ones(1)


class Endless(Restless):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Stream(), batch_size=4)


class ByItself(Restless):
    """Fetches its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override] # Lightning looks at the name
        (x, y), *_ = next(dataloader_iter)
        return (self.net(x) - y).square().mean()


class Validated(Restless):
    """Schedule-Free: its weights are others in a validation. Two loaders, one of which is cycled."""

    def __init__(self) -> None:
        super().__init__(partial(lightning_optim.ScheduleFreeAdamW, lr=0.01))

    def train_dataloader(self) -> Any:
        numbers: Any = torch.arange(10)  # all that a dataset has to be
        return {"a": super().train_dataloader(), "b": DataLoader(numbers, batch_size=7, shuffle=True)}

    def val_dataloader(self) -> DataLoader[Any]:
        return super().train_dataloader()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["a"], batch_idx) * (1 + batch["b"].float().mean() / 100)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validation", self.net(batch[0]).mean())


class Cut(Restless):
    """Leaves the end of each epoch out."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 4 else None


def busy() -> dict[str, Any]:
    callbacks = [EarlyStopping("loss", patience=1), GradientAccumulationScheduler({0: 2, 1: 3})]
    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    return {"callbacks": [*callbacks, LearningRateMonitor("step"), averaging], "logger": DummyLogger(), "max_epochs": 4}


TRAININGS: dict[str, tuple[Any, str, Callable[[], dict[str, Any]]]] = {
    "endless": (Endless, "in_graph", lambda: {"limit_train_batches": 5}),
    "fetches by itself": (ByItself, "auto", dict),
    "evaluates elsewhere": (Validated, "auto", dict),
    "evaluates elsewhere, detached": (Validated, "detached", dict),
    "leaves batches out": (Cut, "auto", dict),
    "many callbacks": (Restless, "auto", busy),
}


@pytest.mark.filterwarnings("ignore:.*(dataloader_iter|shuffling enabled|ambiguous collection|SWA is currently)")
@pytest.mark.parametrize("name", TRAININGS)
def test_other_trainings(name: str) -> None:
    model, strategy, options = TRAININGS[name]
    finder = LRFinder(apply=False, at_epochs=[0, 1], **QUICK)
    found = left_behind(*run(model(), strategy, finder, **({"max_epochs": 2} | options())))
    assert finder.state_dict()["tested"] == [0, 1]
    assert_identical(found, left_behind(*run(model(), strategy, **({"max_epochs": 2} | options()))))


class Noisy(Callback):
    """Counts its calls; as a part of steps it also changes gradients."""

    def __init__(self, part_of_steps: bool) -> None:
        self.part_of_steps, self.calls = part_of_steps, 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.calls += 1
        for p in pl_module.parameters():
            if p.grad is not None:
                p.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def test_other_callbacks_and_loggers_are_silent(tmp_path: Path) -> None:
    class Noted(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.append((step, sorted(metrics)))

    logged: list[Any] = []
    finders = [LRFinder(apply=False, min_lr=0.1, max_lr=1e4, steps=10) for _ in range(2)]
    callbacks = [Noisy(part) for part in (False, True)]
    for finder, callback in zip(finders, callbacks, strict=True):
        trainer, _ = run(
            Restless(partial(torch.optim.SGD, lr=0.1)),
            "auto",
            finder,
            callbacks=[callback],
            logger=Noted(),
            log_every_n_steps=2,
        )
        assert callback.calls == trainer.global_step == 6
    assert [step for step, names in logged if "loss_step" in names] == [1, 3, 5] * 2
    stopped = [None if finder.test is None else finder.test.stopped for finder in finders]
    assert stopped[0], "gradients of a silent callback's making are not those of the test"
    assert stopped[1] is None, "a callback that is a part of steps takes part"


def test_files_and_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finder = LRFinder(apply=False, folder=str(tmp_path / "test"), at_epochs=[0, 1], **QUICK)
    run(Restless(), "auto", finder, enable_progress_bar=True, max_epochs=2)
    assert "LRFinder:" in capsys.readouterr().err
    saved = json.loads((tmp_path / "test" / "epoch_1" / "lr_finder.json").read_text())
    assert RangeTest.from_dict(saved) == finder.test
    assert (tmp_path / "test" / "lr_finder.png").read_bytes()[:4] == b"\x89PNG"
    run(Restless(), "auto", LRFinder(apply=False, **QUICK))
    assert "LRFinder:" not in capsys.readouterr().err, "no bar where the Trainer has none"


# ---------------------------------------------------------------- manual optimization, failures, second fits


class Manual(Restless):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        self.manual_backward(loss / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()
        return loss


@pytest.mark.parametrize("strategy", ["auto", "in_graph", "detached"])
def test_manual_optimization(strategy: str) -> None:
    finder = LRFinder(apply=False, at_epochs=[0, 1], **QUICK)
    found = left_behind(*run(Manual(), strategy, finder, max_epochs=2))
    assert finder.test is not None
    assert len(finder.test.lrs) == 10
    assert_identical(found, left_behind(*run(Manual(), strategy, max_epochs=2)))


class Failing(Restless):
    fails_at = 6

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.seen == self.fails_at:
            loss.register_hook(self._fail)
        return loss

    def _fail(self, gradient: Tensor) -> None:
        raise RuntimeError("in the middle of a backward pass")


@pytest.mark.parametrize("strategy", ["auto", "in_graph", "detached", partial(DetachedStrategy, wait="forward")])
def test_a_failure_leaves_what_was_there(strategy: Any) -> None:
    model, finder = Failing(), LRFinder(apply=False, **QUICK)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(strategy=strategy if isinstance(strategy, str) else strategy(), callbacks=[finder])
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.fit(model)
    assert_identical(dict(model.state_dict()), before)
    assert (model.seen, model.history) == (0, [])
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.01, 0.002]
    assert trainer.global_step == 0
    model.fails_at = -1
    trainer.fit(model)  # the same Trainer
    assert finder.test is not None
    assert trainer.global_step > 0


def test_a_second_fit_is_another_training() -> None:
    finder = LRFinder(apply=False, **QUICK)
    first = run(Restless(), "in_graph", finder)[0]
    test = finder.test
    second = run(Restless(), "in_graph", finder)[0]
    assert finder.test is not test
    assert finder.test == test
    for trainer in (first, second):
        copied = copy.deepcopy(trainer)
        assert [type(callback) for callback in copied.callbacks] == [type(callback) for callback in trainer.callbacks]
    assert pickle.loads(pickle.dumps(finder)).test == test  # noqa: S301 # as a Trainer's start method does


# ---------------------------------------------------------------- refusals


class Two(Manual):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.parameters(), lr=0.1) for _ in range(2)]


class WithoutRate(torch.optim.SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["lr"] = None


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "two optimizers": (Two, {}, "2 optimizers, and a range test is of one learning rate; valid: one optimizer"),
    "L-BFGS": (partial(Restless, partial(torch.optim.LBFGS, lr=1.0)), {}, "LBFGS chooses the length of its steps"),
    "Prodigy": (partial(Restless, lightning_optim.Prodigy), {}, "Prodigy estimates its step size on the way"),
    "no lr": (partial(Restless, WithoutRate), {}, "WithoutRate has no learning rate .lr is None"),
    "lr=0": (
        partial(Restless, lambda g: torch.optim.SGD([{**one, "lr": 0.0} for one in g], lr=0.0)),
        {},
        "all learning rates of SGD are 0",
    ),
    "captured": (Restless, {"strategy": lambda: InGraphStrategy(capture=True)}, "capture=True"),
    "delayed": (Restless, {"strategy": lambda: DetachedStrategy(delay_one_step=True)}, "delay_one_step=True"),
    "twice": (Restless, {"callbacks": [LearningRateFinder()]}, "LearningRateFinder and LRFinder; valid: one of them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_tested_is_refused_when_a_fit_starts(case: str) -> None:
    model, options, message = REFUSED[case]
    model = model()
    if "L-BFGS" in case or "Prodigy" in case or "no lr" in case:
        model.configure_optimizers = lambda: model.make(model.net.parameters())
    options = {name: value() if name == "strategy" else value for name, value in options.items()}
    if case == "twice":
        with pytest.raises(ValueError, match=message):
            LRFinder().on_fit_start(_WithFinders(), None)
        return
    with pytest.raises(ValueError, match=f"LRFinder: {message}"):
        run(model, options.pop("strategy", "auto"), LRFinder(**QUICK), **options)


class _WithFinders:
    callbacks = (LearningRateFinder(), LRFinder())
    strategy = optimizers = None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_lr": 1.0, "max_lr": 0.1}, "min_lr=1.0, max_lr=0.1; valid: min_lr < max_lr"),
        ({"steps": 3}, "steps=3; valid: a whole number >= 10"),
        ({"min_lr": 0.0}, "min_lr=0.0; valid: a finite number > 0"),
        ({"method": "best"}, "method='best'; valid: steepest, minimum, valley"),
        ({"mode": "log"}, "mode='log'; valid: exponential, linear"),
        ({"apply": 1}, "apply=1 is not a bool"),
        ({"at_epochs": []}, r"at_epochs=\[\]; valid: a list of epochs"),
        ({"at_epochs": [-1]}, "at_epochs=-1; valid: a whole number >= 0"),
        ({"smoothing": 1.0}, "smoothing=1.0; valid: a number in"),
        ({"divergence": 1.0}, "divergence=1.0; valid: a finite number > 1, None"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"LRFinder: {message}"):
        LRFinder(**options)


def test_no_loss_no_epoch_no_test(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Restless):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return None

    with pytest.raises(ValueError, match=r"Silent\.training_step returned no loss"):
        run(Silent(), "auto", LRFinder(**QUICK))
    with pytest.warns(LightningOptimWarning, match=r"no epoch of at_epochs=\[7\] began in this fit"):
        run(Restless(), "auto", LRFinder(at_epochs=[7], **QUICK))
    finder = LRFinder(**QUICK)
    run(Restless(), "auto", finder, fast_dev_run=True)
    assert finder.test is None
