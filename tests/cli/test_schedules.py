"""Schedules: their steps, intervals and metrics."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from .common import fit, known_warnings

pytestmark = known_warnings


def test_schedules_step_per_optimizer_step_and_know_the_runs_length() -> None:
    arguments = ["--optimizer=SGD", "--optimizer.lr=1.0", "--lr_scheduler=Linear", "--lr_scheduler.warmup_steps=0.5"]
    cli = fit(*arguments, steps=8)
    assert cli.model.lrs == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25])


def test_accumulated_batches_are_one_step() -> None:
    arguments = ["--optimizer=SGD", "--optimizer.lr=1.0", "--trainer.accumulate_grad_batches=2"]
    cli = fit(*arguments, "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.5", steps=3)
    assert cli.model.lrs == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_the_interval_can_be_an_epoch() -> None:
    arguments = ["--optimizer=SGD", "--optimizer.lr=1.0", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"]
    cli = fit(*arguments, "--lr_interval=epoch", steps=6)
    assert cli.model.lrs == pytest.approx([1.0] * 4 + [0.1] * 2)


def test_plateau_waits_for_its_metric() -> None:
    cli = fit("--optimizer=SGD", "--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=loss", steps=4)
    (config,) = cli.trainer.lr_scheduler_configs
    assert (config.interval, config.monitor, config.reduce_on_plateau) == ("epoch", "loss", True)
