"""``lightning-optim find-lr``, and the callback by flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim.callbacks import LRFinder
from lightning_optim.cli.main import main

from .common import QUIET, Model, error_of, fit, known_warnings, optimizer_of

pytestmark = [*known_warnings, pytest.mark.filterwarnings("ignore:.*(No seed found|tensorboardX)")]

RANGE = ["--min_lr=1e-5", "--max_lr=10", "--steps=40"]


class Learner(Model):
    """Has something to learn."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x = batch[0]
        return (self.layers(x) - x.sum(dim=1, keepdim=True)).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(TensorDataset(torch.randn(256, self.width, generator=generator)), batch_size=32)


class WithItsOwn(Learner):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


TRAINING = [f"--model={__name__}.Learner", "--trainer.max_steps=8", "--seed_everything=1", *QUIET[:2]]


def find(*arguments: str) -> int:
    return main(["find-lr", *RANGE, *TRAINING, *arguments])


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_prints_draws_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": f"{__name__}.Learner",
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.002, "weight_decay": 0.3}},
                "lr_scheduler": {"class_path": "Cosine"},
                "trainer": {"max_steps": 8, "accelerator": "cpu", "callbacks": [f"{__name__}.Saver"]},
            }
        )
    )
    here = {path.name for path in tmp_path.iterdir()}
    assert main(["find-lr", "--config=config.yaml", *RANGE, "--folder=found", "--write=lr.yaml"]) == 0
    printed = capsys.readouterr()
    assert "> steepest" in printed.out
    assert "wrote lr.yaml" in printed.err
    assert {path.name for path in tmp_path.iterdir()} == here | {"found", "lr.yaml"}, "neither logs nor checkpoints"
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"lr_finder.json", "lr_finder.png"}
    test = json.loads((tmp_path / "found" / "lr_finder.json").read_text())
    written = yaml.safe_load((tmp_path / "lr.yaml").read_text())
    assert written["optimizer"]["init_args"] == {"lr": test["suggestions"]["steepest"]["lr"]}
    cli = fit("--config=config.yaml", "--config=lr.yaml", "--trainer.enable_checkpointing=true")
    group = optimizer_of(cli).param_groups[0]
    assert (group["initial_lr"], group["weight_decay"]) == (written["optimizer"]["init_args"]["lr"], 0.3)


class Saver(ModelCheckpoint):
    def __init__(self) -> None:
        super().__init__(dirpath="saved", save_last=True, every_n_train_steps=1)


def test_other_rates_in_the_configuration_are_multiplied(tmp_path: Path) -> None:
    schedule = ["--lr_scheduler=torch.optim.lr_scheduler.OneCycleLR", "--lr_scheduler.max_lr=0.5"]
    arguments = ["--optimizer=AdamW", "--optimizer.lr=0.1", *schedule, "--lr_scheduler.total_steps=8"]
    assert find(*arguments, "--write=lr.yaml", "--method=minimum") == 0
    written = yaml.safe_load((tmp_path / "lr.yaml").read_text())
    found = written["lr_scheduler"]["init_args"]["max_lr"]
    assert found / 0.5 == pytest.approx(written["optimizer"]["init_args"]["lr"] / 0.1, rel=0.01)


def test_as_json_and_when_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert find("--optimizer=AdamW", "--json", "--max_lr=2e-5") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["suggestions"]["steepest"]["lr"] is None
    assert main(["find-lr", *RANGE, f"--model={__name__}.WithItsOwn", *TRAINING[1:]]) in (0, 1)
    assert "range test: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "what is to be trained? --config FILE or --model CLASS as for `fit`"),
        (["--steps=2", *TRAINING, "--optimizer=AdamW"], "LRFinder: steps=2; valid: a whole number >= 10"),
        (["--min_lr=2", "--max_lr=1", *TRAINING, "--optimizer=AdamW"], "valid: min_lr < max_lr"),
        (TRAINING, "Learner has no configure_optimizers of its own: give --optimizer"),
        ([*TRAINING, "--optimizer=Prodigy"], "Prodigy estimates its step size on the way"),
        ([*TRAINING, "--optimizer=AdamW", "--trainer.fast_dev_run=true"], "without --trainer.fast_dev_run"),
        (
            [f"--model={__name__}.WithItsOwn", *TRAINING[1:], "--write=lr.yaml"],
            "--write with an optimizer of WithItsOwn's own: only its code can change its lr",
        ),
        (["--method=best", *TRAINING], "invalid choice: 'best'"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(capsys, lambda: main(["find-lr", *arguments]))


def test_the_callback_by_flags(tmp_path: Path) -> None:
    cli = fit(
        "--optimizer=AdamW",
        "--trainer.callbacks+=lightning_optim.callbacks.LRFinder",
        "--trainer.callbacks.max_lr=0.5",
        "--trainer.callbacks.steps=12",
        "--trainer.callbacks.at_epochs=[0,2]",
        "--trainer.callbacks.apply=false",
        "--trainer.callbacks.method=valley",
        model="Model",
    )
    trainer: Any = cli.trainer
    (finder,) = (one for one in trainer.callbacks if isinstance(one, LRFinder))
    assert (finder.lr_range.max_lr, finder.lr_range.steps, finder.apply) == (0.5, 12, False)
    assert (finder.at_epochs, finder.method) == ([0, 2], "valley")
    assert finder.test is not None
