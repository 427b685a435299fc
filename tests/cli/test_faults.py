"""Bad values end in one line: nothing that a user has to search for below or above a traceback."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

import lightning_optim
from lightning_optim.cli.main import main

from .common import MODULE, QUIET, Model, fit, known_warnings

pytestmark = known_warnings


class OwnMistake(Model):
    def configure_optimizers(self) -> lightning_optim.AdamW:
        return lightning_optim.AdamW(self.parameters(), lr=-1.0)


class FailsInTraining(Model):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        raise ValueError("in the training step")


def _run(flags: str, folder: Path, model: str = f"{MODULE}.Model") -> int:
    start = [f"--model={model}", "--trainer.max_steps=1", f"--trainer.default_root_dir={folder}"]
    return main(["fit", *start, *QUIET, *shlex.split(flags)])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--optimizer=AdamW --optimizer.lr=-1", "AdamW: lr=-1.0; valid: a finite number >= 0"),
        ("--optimizer=AdamW --optimizer.betas=[0.9,1.5]", "AdamW: betas[1]=1.5; valid: a number in [0, 1)"),
        ("--optimizer=AdamW --optimizer.engine=hots", "engine='hots' is not an engine; valid: auto, eager"),
        ("--optimizer=SAM --optimizer.base=Lion --optimizer.base.lr=-1", "Lion: lr=-1.0; valid: a finite number"),
        ("--optimizer=SAM --optimizer.base=Lion --optimizer.rho=-1", "SAM: rho=-1.0; valid: a finite number >= 0"),
        ("--optimizer=torch.optim.AdamW --optimizer.lr=-1", "Invalid learning rate: -1.0"),
        (
            "--optimizer=AdamW --lr_scheduler=Cosine --lr_scheduler.warmup_steps=-3",
            "Cosine: warmup_steps=-3; valid: a whole",
        ),
        (
            "--optimizer=AdamW --lr_scheduler=Cosine --trainer.max_steps=-1 --trainer.max_epochs=-1",
            "Cannot fill total_steps of Cosine: the run has no end",
        ),
        ("--optimizer=AdamW --param_groups.layer_decay=3", "layer_decay=3.0; valid: a number in (0, 1]"),
        ("--optimizer=AdamW --param_groups.no_decay=[x.*]", "the pattern 'x.*' matches no parameter; the names are:"),
        ("--optimizer=AdamW --ckpt_path=/none.ckpt", "Checkpoint file not found: /none.ckpt"),
        ("--optimizer=AdamW --trainer.accelerator=gpuu", "You selected an invalid accelerator name"),
        (
            "--optimizer=AdamW --trainer.strategy=in-graph",
            "strategy='in-graph' is no strategy (did you mean 'in_graph'?)",
        ),
        ("--optimizer=AdamW --trainer.strategy=detatched", "(did you mean 'detached'?); valid: in_graph, in_graph_ddp"),
        (
            "--optimizer=AdamW --trainer.strategy=InGraphStrateg",
            "(did you mean 'lightning_optim.strategies.InGraphStrategy'?)",
        ),
        (
            "--optimizer=AdamW --trainer.strategy=lightning_optim.strategies.InGraphStrategy"
            " --trainer.strategy.undo.treshold=6",
            "undo has no option 'treshold'; valid: threshold, window",
        ),
        (
            "--optimizer=AdamW --optimizer.max_grad_norm=1 --trainer.gradient_clip_val=1 --trainer.strategy=in_graph",
            "gradients would be clipped twice",
        ),
    ],
)
def test_a_bad_value_ends_in_one_line(
    flags: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(flags, tmp_path) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("lightning-optim fit: error: ")
    assert line in last


def test_a_bad_value_leaves_nothing_that_stops_the_next_run(tmp_path: Path) -> None:
    """LightningCLI writes the configuration when the training begins, and never over another one."""
    assert _run("--optimizer=AdamW --optimizer.lr=-1", tmp_path) == 2
    assert not list(tmp_path.iterdir())
    assert _run("--optimizer=AdamW --optimizer.lr=1", tmp_path) == 0


@pytest.mark.parametrize("model", ["OwnMistake", "FailsInTraining"])
def test_what_others_wrote_fails_with_its_traceback(model: str, tmp_path: Path) -> None:
    flags = "" if model == "OwnMistake" else "--optimizer=AdamW"
    with pytest.raises(ValueError, match=r"lr=-1|in the training step"):
        _run(flags, tmp_path, f"{__name__}.{model}")


def test_the_traceback_can_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ValueError, match="lr=-1"):
        _run("--optimizer=AdamW --optimizer.lr=-1", tmp_path)


def test_in_a_program_the_class_raises_what_it_did() -> None:
    """A sweep may catch it."""
    with pytest.raises(ValueError, match=r"AdamW: lr=-1\.0; valid"):
        fit("--optimizer=AdamW", "--optimizer.lr=-1")
    with pytest.raises(ValueError, match="did you mean 'detached_ddp'"):
        fit("--optimizer=AdamW", "--trainer.strategy=detachedddp")


def test_an_interrupt_and_a_closed_pipe_end_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupt(*args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_optim.cli.listing.main", interrupt)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "lightning-optim: interrupted\n"

    def nobody_reads(*args: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr("lightning_optim.cli.listing.main", nobody_reads)
    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert main(["list"]) == 141


class OfSomebodyElse(torch.optim.SGD):
    """Knows what it will be given."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.1) -> None:
        weights = list(params)
        assert len(weights) == 6, "the model's"
        super().__init__(weights, lr)


@pytest.mark.parametrize("flags", ["--optimizer={}", "--optimizer=SAM --optimizer.base={}"])
def test_classes_of_others_are_made_for_the_model_alone(flags: str, tmp_path: Path) -> None:
    assert _run(flags.format(f"{__name__}.OfSomebodyElse"), tmp_path) == 0
