"""What the tests of the command line share: models, and how a command line is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI

from lightning_optim.cli.optim_cli import OptimCLI

#: Where a command line finds the models below.
MODULE = __name__

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_checkpointing=false",
]


# Of LightningCLI itself, about its use of jsonargparse; of the Trainer, about a data loader of four batches.
known_warnings = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|LeafSpec|number of training batches)"),
]


class Model(LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.layers = self.build()
        self.lrs: list[float] = []

    def build(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(self.width, 4), nn.LayerNorm(4), nn.Linear(4, 1))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        optimizer = self.trainer.optimizers[0]
        self.lrs.append(float(optimizer.param_groups[0]["lr"]))
        loss = self.layers(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(8, self.width)), batch_size=2)


class LateModel(Model):
    """Has no parameters until the Trainer asks for its layers."""

    def build(self) -> nn.Sequential:
        return nn.Sequential()

    def configure_model(self) -> None:
        if not self.layers:
            self.layers = super().build()


class OwnOptimizer(Model):
    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class TwoSchedules(Model):
    """Takes an optimizer and a chain of schedules as factories, as a user's own script may."""

    def __init__(
        self,
        optimizer: Callable[[Any], Optimizer] = torch.optim.SGD,
        schedules: list[Callable[[Optimizer], LRScheduler]] | None = None,
    ) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.make_schedules = schedules or []

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [{"scheduler": make(optimizer), "interval": "step"} for make in self.make_schedules]


def fit(*arguments: str, model: str = "Model", steps: int = 1) -> OptimCLI:
    return OptimCLI(
        args=["fit", f"--model={__name__}.{model}", f"--trainer.max_steps={steps}", *QUIET, *arguments],
        save_config_callback=None,
    )


def build(*arguments: str) -> Any:
    """What the model's ``configure_optimizers`` gives, without a training."""
    cli = OptimCLI(args=[f"--model={__name__}.Model", *QUIET, *arguments], run=False, save_config_callback=None)
    return cli.model.configure_optimizers()


def optimizer_of(cli: LightningCLI) -> Optimizer:
    (optimizer,) = cli.trainer.optimizers
    return optimizer


def error_of(capsys: pytest.CaptureFixture[str], run: Callable[[], object]) -> str:
    with pytest.raises(SystemExit) as exit_info:
        run()
    assert exit_info.value.code == 2
    return capsys.readouterr().err
