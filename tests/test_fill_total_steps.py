"""Totals filled inside real Trainers of both roots of Lightning."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
)
from lightning.pytorch.cli import LightningCLI
from torch.optim.lr_scheduler import SequentialLR, StepLR
from torch.utils.data import DataLoader, IterableDataset

from lightning_optim.callbacks import FillTotalSteps
from lightning_optim.schedulers import WSD, Cosine, Linear, Schedule
from lightning_optim.warnings import LightningOptimWarning

Make = Callable[..., Schedule]


@pytest.fixture(autouse=True)
def _warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_optim.warnings._seen", set())


def curve(schedule: Make, total: int, length: int, repeat: int = 1, **options: Any) -> list[float]:
    """The learning rates that ``length`` optimizer steps are to have, with a base of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    known = schedule(optimizer, total_steps=total, **options)
    return [known.factor(t // repeat) for t in range(length)]


class Endless(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield torch.ones(1)


def make_tiny(root: Any) -> Any:
    """A model of either root of Lightning that notes the learning rate of each optimizer step."""

    class Tiny(root.LightningModule):
        def __init__(self, schedule: Any = None, batches: int | None = 10, **config: Any) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.schedule, self.batches, self.config = schedule, batches, config
            self.lrs: list[float] = []

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).sum()

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.lrs.append(optimizer.param_groups[0]["lr"])

        def train_dataloader(self) -> Any:
            data: Any = Endless() if self.batches is None else torch.ones(self.batches, 1)
            return DataLoader(data, batch_size=1)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step", **self.config}]

    return Tiny


Tiny = make_tiny(pl)


def fit(model: Any, *, ckpt_path: Path | None = None, root: Any = pl, **limits: Any) -> Schedule:
    limits = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"} | limits
    trainer = root.Trainer(enable_progress_bar=False, enable_model_summary=False, **limits)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(num_workers|log_every_n_steps|scheduler.step).*")
        trainer.fit(model, ckpt_path=ckpt_path)
    return trainer.lr_scheduler_configs[0].scheduler


@pytest.mark.parametrize(
    ("model", "limits", "total", "steps", "repeat"),
    [
        ({}, {"max_steps": 12}, 12, 12, 1),
        ({}, {"max_epochs": 2}, 20, 20, 1),
        ({}, {"max_epochs": 2, "max_steps": 12}, 12, 12, 1),
        ({}, {"max_epochs": 2, "accumulate_grad_batches": 4}, 6, 6, 1),
        ({}, {"max_epochs": 2, "limit_train_batches": 0.5}, 10, 10, 1),
        ({"frequency": 2}, {"max_epochs": 2}, 10, 20, 2),
        # Frequency counts batches: steps come after 4, 8 and 10, each of them a multiple of 2.
        ({"frequency": 2}, {"max_epochs": 2, "accumulate_grad_batches": 4}, 6, 6, 1),
        ({"interval": "epoch"}, {"max_epochs": 3}, 3, 30, 10),
        ({"interval": "epoch"}, {"max_steps": 25}, 3, 25, 10),
        ({"interval": "epoch", "frequency": 2}, {"max_epochs": 3}, 2, 30, 20),
        ({"batches": None}, {"max_steps": 12, "accumulate_grad_batches": 2}, 12, 12, 1),
    ],
)
def test_total_in_a_trainer(model: dict[str, Any], limits: dict[str, Any], total: int, steps: int, repeat: int) -> None:
    tiny = Tiny(lambda optimizer: Cosine(optimizer, warmup_steps=0.25), **model)
    schedule = fit(tiny, **limits)
    assert schedule.total_steps == total
    assert tiny.lrs == curve(Cosine, total, steps, repeat, warmup_steps=0.25)


def test_gradient_accumulation_scheduler_is_followed() -> None:
    tiny = Tiny(Linear)
    schedule = fit(tiny, max_epochs=3, callbacks=[GradientAccumulationScheduler({1: 4})])
    assert schedule.total_steps == len(tiny.lrs) == 10 + 3 + 3
    assert tiny.lrs == curve(Linear, 16, 16)


def test_given_total_is_kept() -> None:
    tiny = Tiny(lambda optimizer: Linear(optimizer, total_steps=40))
    fit(tiny, max_steps=10)
    assert tiny.lrs == curve(Linear, 40, 10)


def test_sequential_in_a_trainer() -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> SequentialLR:
        return SequentialLR(optimizer, [Linear(optimizer), Cosine(optimizer)], milestones=[4])

    tiny = Tiny(schedule)
    fit(tiny, max_steps=12)
    assert tiny.lrs == curve(Linear, 4, 4) + curve(Cosine, 8, 8)


@pytest.mark.parametrize("schedule", [Linear, Cosine, WSD])
def test_resume_is_exact_and_a_longer_run_stretches(tmp_path: Path, schedule: Make) -> None:
    def build() -> Any:
        return Tiny(lambda optimizer: schedule(optimizer, warmup_steps=0.2), batches=7)

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "5.ckpt")

    whole = build()
    fit(whole, max_steps=10, callbacks=[Save()])
    same = build()
    fit(same, max_steps=10, ckpt_path=tmp_path / "5.ckpt")
    assert same.lrs == whole.lrs[5:]
    longer = build()
    fit(longer, max_steps=20, ckpt_path=tmp_path / "5.ckpt")
    assert longer.lrs == curve(schedule, 20, 20, warmup_steps=0.2)[5:]


def test_tuners_that_train_before_the_training_starts(tmp_path: Path) -> None:
    class Tunable(Tiny):  # type: ignore[misc,valid-type]
        batch_size = 1
        lr = 1.0

        def train_dataloader(self) -> Any:
            data: Any = torch.ones(64, 1)
            return DataLoader(data, batch_size=self.batch_size)

    found: list[Callback] = [
        BatchSizeFinder(max_trials=2, steps_per_trial=3),
        LearningRateFinder(num_training_steps=5, update_attr=False),
    ]
    for tuner in found:
        model = Tunable(lambda optimizer: Cosine(optimizer, warmup_steps=0.25))
        schedule = fit(model, max_epochs=1, callbacks=[tuner], default_root_dir=tmp_path)
        total = 64 // model.batch_size
        assert schedule.total_steps == schedule.last_epoch == total
        if isinstance(tuner, BatchSizeFinder):
            assert model.batch_size > 1
            assert model.lrs[-total:] == curve(Cosine, total, total, warmup_steps=0.25)


def test_smoke_run_shorter_than_the_warmup_goes_through() -> None:
    with pytest.warns(LightningOptimWarning, match="warmup_steps=77 must not exceed total_steps=1"):
        fit(Tiny(lambda optimizer: Linear(optimizer, warmup_steps=77)), fast_dev_run=True)


def test_frequency_that_never_meets_an_optimizer_step_warns() -> None:
    tiny = Tiny(Linear, frequency=7)
    with pytest.warns(LightningOptimWarning, match=r"never steps: frequency=7.*grad_batches=\{0: 4\}"):
        fit(tiny, max_epochs=2, accumulate_grad_batches=4)
    assert tiny.lrs == [1.0] * 6


def test_run_without_an_end_is_an_error() -> None:
    with pytest.raises(ValueError, match="Cannot fill total_steps of Cosine: the run has no end"):
        fit(Tiny(Cosine), max_epochs=-1)
    with pytest.raises(ValueError, match=r"Cannot fill total_steps of Cosine: .* max_epochs is needed"):
        fit(Tiny(Cosine, batches=None, interval="epoch"), max_steps=5)


def test_stateful_loader_resumes_where_it_was(tmp_path: Path) -> None:
    """Filling must not set the data up before the checkpoint is read: the loader's position would be lost."""

    class Loader:
        def __init__(self) -> None:
            self.position = 0

        def __iter__(self) -> Iterator[torch.Tensor]:
            while self.position < 6:
                self.position += 1
                yield torch.full((1, 1), float(self.position))
            self.position = 0

        def __len__(self) -> int:
            return 6

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.position = state["position"]

    class Positions(Tiny):  # type: ignore[misc,valid-type]
        def train_dataloader(self) -> Any:
            self.seen: list[float] = []
            return Loader()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            self.seen.append(float(batch))
            if self.trainer.global_step == 2:
                self.trainer.save_checkpoint(tmp_path / "2.ckpt")
            return super().training_step(batch, batch_idx)

    fit(Positions(Linear), max_epochs=1)
    resumed = Positions(Linear)
    fit(resumed, max_epochs=1, ckpt_path=tmp_path / "2.ckpt")
    plain = Positions(lambda optimizer: StepLR(optimizer, 1))
    fit(plain, max_epochs=1)
    plain_resumed = Positions(lambda optimizer: StepLR(optimizer, 1))
    fit(plain_resumed, max_epochs=1, ckpt_path=tmp_path / "2.ckpt")
    assert resumed.seen == plain_resumed.seen
    assert resumed.seen[0] > 1


# ---------------------------------------------------------------- registration


@pytest.mark.parametrize("root", [pl, pytorch_lightning])
def test_a_fit_that_needs_it_gets_it_with_a_class_of_its_own_root(root: Any) -> None:
    tiny = make_tiny(root)(Cosine)
    schedule = fit(tiny, root=root, max_steps=6)
    assert schedule.total_steps == 6
    assert type(tiny.trainer.callbacks[0]).__name__ == "FillTotalSteps"
    ours = [callback for callback in tiny.trainer.callbacks if type(callback).__name__ == "FillTotalSteps"]
    assert len(ours) == 1
    assert isinstance(ours[0], root.Callback)


def test_adding_it_by_hand_too_does_no_harm() -> None:
    assert fit(Tiny(Cosine), max_steps=6, callbacks=[FillTotalSteps()]).total_steps == 6


def test_importing_the_packages_imports_no_framework() -> None:
    code = (
        "import sys, lightning_optim, lightning_optim.callbacks, lightning_optim.callbacks.joining\n"
        "import lightning_optim.schedulers, lightning_optim.control.schedules.totals\n"
        "import lightning_optim.param_groups\n"
        "print(sorted({'lightning', 'pytorch_lightning', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_lazy_names_of_the_callbacks_package() -> None:
    package = importlib.import_module("lightning_optim.callbacks")
    assert "FillTotalSteps" in dir(package)
    with pytest.raises(AttributeError, match=r"has no attribute 'Nothing'; it has .*FillTotalSteps"):
        _ = package.Nothing


# ---------------------------------------------------------------- a plain LightningCLI


class CLITiny(Tiny):  # type: ignore[misc,valid-type]
    def __init__(self) -> None:
        super().__init__()

    configure_optimizers = pl.LightningModule.configure_optimizers


def cli(*arguments: str) -> LightningCLI:
    quiet = ["logger=false", "enable_checkpointing=false", "enable_progress_bar=false", "accelerator=cpu"]
    flags = [f"--trainer.{flag}" for flag in [*quiet, "enable_model_summary=false"]]
    optimizer = ["--optimizer=torch.optim.SGD", "--optimizer.lr=1.0"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(num_workers|log_every_n_steps).*")
        return LightningCLI(CLITiny, args=["fit", *flags, *optimizer, *arguments], save_config_callback=None)


@pytest.mark.parametrize(("warmup", "steps"), [("0.5", 2), ("1", 1)])
def test_plain_lightning_cli(warmup: str, steps: int) -> None:
    # Plain LightningCLI always steps schedules by epoch.
    done = cli(
        "--lr_scheduler=lightning_optim.schedulers.Cosine",
        f"--lr_scheduler.warmup_steps={warmup}",
        "--trainer.max_epochs=4",
    )
    assert done.model.lrs == curve(Cosine, 4, 40, repeat=10, warmup_steps=steps)


def test_plain_lightning_cli_reads_the_literal() -> None:
    done = cli(
        "--lr_scheduler=lightning_optim.schedulers.WSD",
        "--lr_scheduler.decay=linear",
        "--lr_scheduler.decay_steps=0.5",
        "--trainer.max_epochs=4",
    )
    assert done.model.lrs == curve(WSD, 4, 40, repeat=10, decay="linear", decay_steps=2)


def test_plain_lightning_cli_refuses_a_float_count() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps=100.0; valid: a whole .* \(100 for 100 steps\)"):
        cli("--lr_scheduler=lightning_optim.schedulers.Cosine", "--lr_scheduler.warmup_steps=1e2")
