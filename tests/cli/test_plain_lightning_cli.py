"""A plain LightningCLI, as in a user's own script."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from lightning.pytorch.cli import LightningCLI

import lightning_optim

from .common import QUIET, Model, TwoSchedules, known_warnings, optimizer_of

pytestmark = known_warnings


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("AdamW", torch.optim.AdamW),
        ("SGD", torch.optim.SGD),
        ("Lion", lightning_optim.Lion),
        ("lightning_optim.AdamW", lightning_optim.AdamW),
    ],
)
def test_plain_lightning_cli(name: str, cls: type) -> None:
    arguments = ["fit", "--trainer.max_steps=1", *QUIET, f"--optimizer={name}", "--optimizer.lr=0.1"]
    assert type(optimizer_of(LightningCLI(Model, args=arguments, save_config_callback=None))) is cls


def test_plain_lightning_cli_with_factories() -> None:
    schedules = [{"class_path": "Linear", "init_args": {"warmup_steps": 2}}, {"class_path": "lightning_optim.WSD"}]
    cli = LightningCLI(
        TwoSchedules,
        args=[
            "fit",
            "--trainer.max_steps=4",
            *QUIET,
            "--model.optimizer=lightning_optim.AdamW",
            "--model.optimizer.lr=0.5",
            f"--model.schedules={json.dumps(schedules)}",
        ],
        save_config_callback=None,
    )
    assert type(optimizer_of(cli)) is lightning_optim.AdamW
    assert [type(config.scheduler).__name__ for config in cli.trainer.lr_scheduler_configs] == ["Linear", "WSD"]
