"""Under Lightning: flags, help, automatic optimization, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from lightning_optim import LBFGS
from lightning_optim.cli.main import main
from lightning_optim.cli.optim_cli import OptimCLI

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*(does not have many workers|LeafSpec|number of training batches|LightningCLI's)"
    ),
]

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
FLAGS = [f"--trainer.{key}={str(value).lower()}" for key, value in QUIET.items()]


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        for p in self.layers.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = (self.layers(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()
        self.losses.append(loss.item())
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return DataLoader(TensorDataset(x), batch_size=8)


class Automatic(Model):
    def configure_optimizers(self) -> LBFGS:
        return LBFGS(self.parameters(), history_size=5)


def test_plain_lightning_cli() -> None:
    """``--optimizer LBFGS`` stays torch's, also with ours imported."""
    for spelled, cls in (("lightning_optim.LBFGS", LBFGS), ("LBFGS", torch.optim.LBFGS)):
        flags = [f"--optimizer={spelled}", "--optimizer.history_size=5", "--trainer.max_steps=3"]
        cli = LightningCLI(Model, args=["fit", *FLAGS, *flags], save_config_callback=None)
        (optimizer,) = cli.trainer.optimizers
        assert type(optimizer) is cls
        assert cli.model.losses[-1] < cli.model.losses[0]
    assert cli.trainer.optimizers[0].param_groups[0]["history_size"] == 5


def test_all_options_are_flags() -> None:
    flags = {
        "history_size": "5",
        "line_search": "null",
        "max_iter": "2",
        "max_eval": "9",
        "noise": "auto",
        "history_dtype": "float64",
        "reuse_evaluation": "true",
        "memory_budget": "0.5",
        "min_curvature": "1e-9",
        "tolerance_grad": "1e-3",
        "tolerance_change": "1e-4",
    }
    given = ["--optimizer=lbfgs", "--param_groups={}", *(f"--optimizer.{key}={value}" for key, value in flags.items())]
    cli = OptimCLI(Model, args=[*FLAGS, *given], run=False, save_config_callback=None)
    optimizer: Any = cli.model.configure_optimizers()["optimizer"]
    assert type(optimizer) is LBFGS
    assert vars(optimizer.options) == {
        "history_size": 5,
        "line_search": None,
        "max_iter": 2,
        "max_eval": 9,
        "noise": "auto",
        "history_dtype": "float64",
        "reuse_evaluation": True,
        "memory_budget": 0.5,
        "min_curvature": 1e-9,
        "tolerance_grad": 1e-3,
        "tolerance_change": 1e-4,
    }


def test_help_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--optimizer.help", "lbfgs"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert "lightning_optim.LBFGS" in printed
    assert "--optimizer.history_size" in printed
    assert "Pairs that are kept" in printed
    assert main(["list"]) == 0
    assert "lbfgs" in capsys.readouterr().out


def test_automatic_optimization_equals_a_plain_loop() -> None:
    trained = Automatic()
    Trainer(max_epochs=6, **QUIET).fit(trained)
    plain = Automatic()
    optimizer = plain.configure_optimizers()
    (batch,) = plain.train_dataloader()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = plain.training_step(batch, 0)
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
    for p, q in zip(trained.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    assert trained.losses == plain.losses


def test_resumed_by_the_trainer_to_the_bit(tmp_path: Path) -> None:
    straight = Automatic()
    Trainer(max_epochs=6, **QUIET).fit(straight)
    half = Automatic()
    trainer = Trainer(max_epochs=3, **QUIET)
    trainer.fit(half)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Automatic()
    Trainer(max_epochs=6, **QUIET).fit(resumed, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
