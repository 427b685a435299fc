"""``LossScaling`` in two processes, of which one overflows: both skip, both count, and both give up together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from ranks import RANKS, enter, launch, leave
from strategies.common import OPTIMIZERS, Model, assert_same_steps, dataset, fit, known_warnings
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

import lightning_optim.strategies  # noqa: F401 # makes the names known, in every process
from lightning_optim.callbacks import LossScaling
from lightning_optim.control.loss_scale import TooManySkippedStepsError

pytestmark = known_warnings

KINDS = ["ddp", "fsdp2", "in_graph_ddp", "in_graph_fsdp2", "detached_ddp", "detached_fsdp2"]
CASES: dict[str, dict[str, Any]] = {"plain": {}, "accumulate": {"accumulate_grad_batches": 2}}


class Shared(Model):
    """Each rank sees every other sample, and the first of them overflows in batch 2, or in all from some batch on."""

    def __init__(self, begin: int = 100) -> None:
        super().__init__(OPTIMIZERS["torch AdamW"], 1)
        self.begin = begin

    def configure_model(self) -> None:
        if self.trainer.strategy.__class__.__name__.endswith(("FSDP2Strategy", "ModelParallelStrategy")):
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = super().training_step(batch, batch_idx)
        bad = self.trainer.global_rank == 0 and (batch_idx == 2 or batch_idx >= self.begin)
        return loss * math.inf if bad else loss

    def train_dataloader(self) -> DataLoader[Any]:
        data = dataset()
        return DataLoader(data, batch_size=self.batch, sampler=DistributedSampler(data, shuffle=False))


def _rank(rank: int, folder: Path) -> None:
    enter(rank, folder)
    from lightning.pytorch.strategies import ModelParallelStrategy

    def training(kind: str, model: Shared, callback: LossScaling, **more: Any) -> tuple[Any, Any]:
        strategy = ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1) if kind == "fsdp2" else kind
        options = {"devices": RANKS, "use_distributed_sampler": False, "plugins": [MixedPrecision("16-mixed", "cpu")]}
        return fit(model, strategy, callbacks=[callback], **options, **more)

    found: dict[tuple[str, str], Any] = {}
    for kind in KINDS:
        for case, options in CASES.items():
            callback = LossScaling(init_scale=64.0, growth_interval=2, max_scale=128.0)
            _, noted = training(kind, Shared(), callback, **options)
            weights = [
                {key: getattr(value, "full_tensor", lambda value=value: value)() for key, value in step.items()}
                for step in noted.weights
            ]
            assert callback.scaler is not None
            found[kind, case] = weights, noted.lrs, callback.scaler.state_dict()
        model = Shared(begin=4)
        try:
            training(kind, model, LossScaling(init_scale=64.0, max_skipped_steps=3))
        except TooManySkippedStepsError as error:
            found[kind, "error"] = str(error), model.trainer.fit_loop.epoch_loop.batch_idx
    torch.save(found, folder / f"{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    launch(_rank, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


class _Noted:
    def __init__(self, noted: tuple[Any, ...]) -> None:
        self.weights, self.lrs, self.scaler = noted


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_both_processes_skip(kind: str, case: str, ranks: list[dict[Any, Any]]) -> None:
    here, there = (_Noted(rank[kind, case]) for rank in ranks)
    assert_same_steps(here, there, rtol=0, atol=0)
    assert here.scaler == there.scaler
    assert here.scaler["skipped_steps"] == [1]
    steps = len(set(here.lrs))
    assert steps == (7 if case == "plain" else 4)  # the schedule has waited, once
    # Averages of two halves, in float32 and another order.
    assert_same_steps(here, _Noted(ranks[0]["ddp", case]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_both_processes_give_up(kind: str, ranks: list[dict[Any, Any]]) -> None:
    """At the same step; each says what it has seen. (The first has all of the last layer, which has one row.)"""
    for rank in ranks:
        message, batch = rank[kind, "error"]
        assert batch == 6
        assert message.startswith("LossScaler: 3 steps in a row were skipped")
    assert "The loss itself was inf or NaN" in ranks[0][kind, "error"][0]
    assert "in the backward pass was that of net.3." in ranks[0][kind, "error"][0]
    if kind in ("ddp", "in_graph_ddp"):  # which have averages of all gradients where the others have parts
        assert "in the backward pass was that of net.3." in ranks[1][kind, "error"][0]
