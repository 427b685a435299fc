"""Under what names Lightning's monitor logs learning rates."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lightning")

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor

from lightning_optim import AdamW

from .common import Flagged


class Scheduled(Flagged):
    """With an optimizer of its own."""

    def configure_optimizers(self) -> AdamW:
        return AdamW(self.parameters(), lr=0.1)


def test_the_monitor_writes_the_public_name(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    monitor = LearningRateMonitor(logging_interval="step")
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        default_root_dir=tmp_path,
        logger=CSVLogger(tmp_path),
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Scheduled())
    assert list(monitor.lrs) == ["lr-AdamW"]
