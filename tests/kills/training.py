"""The training that is killed: small, the same in every run, with all that a checkpoint has to carry."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader

import lightning_optim
from lightning_optim.strategies import DetachedStrategy, InGraphStrategy, OptimAutoStrategy

EPOCHS, BATCHES = 2, 19
#: Where a run has its checkpoints, and its last state, below its folder.
CHECKPOINTS, LAST = "checkpoints", "end.ckpt"


def _sam(parameters: Any, **options: Any) -> lightning_optim.SAM:
    return lightning_optim.SAM(parameters, partial(lightning_optim.AdamW, **options))


def _cosine(optimizer: Optimizer) -> Any:
    return {
        "scheduler": lightning_optim.Cosine(optimizer, warmup_steps=0.1),
        "interval": "step",
    }  # its total is unknown


def _by_epochs(optimizer: Optimizer) -> Any:
    return {"scheduler": lightning_optim.WSD(optimizer), "interval": "epoch"}


def _cycle(optimizer: Optimizer) -> Any:
    return {"scheduler": lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=EPOCHS * BATCHES), "interval": "step"}


def _sequence(optimizer: Optimizer) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5), lr_scheduler.CosineAnnealingLR(optimizer, 20)]
    return {"scheduler": lr_scheduler.SequentialLR(optimizer, parts, [5]), "interval": "step"}


@dataclass(frozen=True)
class Configuration:
    """What differs between the trainings.

    Attributes:
        strategy: Makes the Trainer's.
        precision: Of the Trainer.
        accumulate: Batches in an optimizer step.
        every: Optimizer steps between checkpoints.
        optimizer: Makes the optimizer.
        options: Of the optimizer.
        schedule: Makes the schedule, as ``configure_optimizers`` returns it.
        spikes: Batches, counted from the beginning of the run, whose loss is infinite.
    """

    strategy: Callable[[], Any] = lambda: "auto"
    precision: Any = "32-true"
    accumulate: int = 1
    every: int = 4
    optimizer: Callable[..., Any] = lightning_optim.AdamW
    options: dict[str, Any] = field(default_factory=dict)
    schedule: Callable[[Optimizer], Any] = _cosine
    spikes: tuple[int, ...] = ()


_STOCHASTIC = {"rounding": "stochastic", "state_dtype": "bfloat16"}
#: A batch that spikes undoes the step before it, unless the run was resumed in between, as the documentation says. So
#: that step must be in no checkpoint: these are taken after steps 4, 8, ..., which are followed by batches 4, 8, ...
_SPIKES = (6, 7, 22)

CONFIGURATIONS: dict[str, Configuration] = {
    "auto": Configuration(),
    "auto, stochastic": Configuration(precision="bf16-true", options=_STOCHASTIC),
    "in_graph": Configuration(lambda: "in_graph"),
    "in_graph, accumulation": Configuration(lambda: "in_graph", accumulate=4, every=3),
    "in_graph, sam": Configuration(lambda: "in_graph", optimizer=_sam),
    "in_graph, undo": Configuration(lambda: InGraphStrategy(undo={"recover_steps": 5}), spikes=_SPIKES),
    "detached": Configuration(lambda: "detached"),
    "detached, bf16": Configuration(lambda: "detached", precision="bf16-true"),
    "detached, stochastic": Configuration(lambda: "detached", precision="bf16-true", options=_STOCHASTIC),
    "detached, accumulation": Configuration(lambda: "detached", precision="bf16-true", accumulate=4, every=3),
    "detached, speculative": Configuration(lambda: DetachedStrategy(clip="speculative"), precision="bf16-true"),
    "detached, scaled": Configuration(lambda: "detached", precision="16-mixed", spikes=(3, 4, 9)),
    "detached, undo": Configuration(
        lambda: DetachedStrategy(undo={"recover_steps": 5}), precision="bf16-true", spikes=_SPIKES
    ),
    "optim_auto": Configuration(lambda: "optim_auto"),
    "optim_auto, bf16": Configuration(lambda: OptimAutoStrategy(clip="exact"), precision="bf16-true"),
    "optim_auto, scaled": Configuration(lambda: "optim_auto", precision="16-mixed", spikes=(3, 4, 9)),
    "optim_auto, cycle": Configuration(lambda: "optim_auto", schedule=_cycle),
    "optim_auto, sequence": Configuration(lambda: "optim_auto", schedule=_sequence),
    "optim_auto, accumulation": Configuration(lambda: "optim_auto", accumulate=4, every=3, schedule=_by_epochs),
    "optim_auto, undo": Configuration(lambda: OptimAutoStrategy(undo={"recover_steps": 5}), spikes=_SPIKES),
}


class Model(LightningModule):
    """A network with buffers, whose batches are drawn by their numbers."""

    def __init__(self, configuration: Configuration) -> None:
        super().__init__()
        self.configuration = configuration
        self.net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Linear(32, 8))

    def training_step(self, batch: Any, index: int) -> Tensor:
        number = self.current_epoch * BATCHES + index
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(number)).to(self.dtype)
        loss = (self.net(x) - x.roll(1, 1)).square().mean()
        self.log("loss", loss)
        return loss * torch.inf if number in self.configuration.spikes else loss

    def configure_optimizers(self) -> Any:
        chosen = self.configuration
        optimizer = chosen.optimizer(self.parameters(), lr=0.02, weight_decay=0.1, **chosen.options)
        return {"optimizer": optimizer, "lr_scheduler": chosen.schedule(optimizer)}

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(range(BATCHES))  # type: ignore[arg-type]


def train(name: str, resume: Path | None, on_batch: Callable[[int], None]) -> None:
    """Train in the current folder, to the end.

    Args:
        name: The configuration.
        resume: The checkpoint to go on from.
        on_batch: Told of each batch before it begins, by its number in this process.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    configuration = CONFIGURATIONS[name]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep = _AfterSteps(
        CHECKPOINTS,
        monitor="loss",
        save_top_k=2,
        save_last=True,
        every_n_train_steps=configuration.every,
        enable_version_counter=False,  # a file that a killed process left is written anew, under the same name
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=configuration.strategy(),
        precision=configuration.precision,
        max_epochs=EPOCHS,
        accumulate_grad_batches=configuration.accumulate,
        gradient_clip_val=1.0,
        callbacks=[keep, _Tell(on_batch)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(configuration), ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(LAST)


class _AfterSteps(ModelCheckpoint):
    """Lightning's, but only where a window of batches is complete.

    Lightning's does not remember in a resumed run that it has saved this step, and saves it again after the window's
    next batch, whose gradients are then in no checkpoint.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.current_score = state_dict["current_score"]  # which Lightning's saves, and forgets

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            super().on_train_batch_end(trainer, *args, **kwargs)


class _Tell(Callback):
    def __init__(self, on_batch: Callable[[int], None]) -> None:
        self.on_batch, self.batches = on_batch, 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.on_batch(self.batches)
        self.batches += 1
