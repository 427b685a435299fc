"""``LRFinder`` in two processes: they agree, and the training after it is the one without it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RANKS, enter, launch, leave
from strategies.common import CLOSE, OPTIMIZERS, Model, dataset, fit, scaled
from torch.utils.data import DataLoader, DistributedSampler

import lightning_optim.strategies  # noqa: F401 # makes the names known, in every process
from lightning_optim.callbacks import LRFinder

from .range_tests import assert_identical

FINDER: dict[str, Any] = {"min_lr": 1e-4, "max_lr": 1.0, "steps": 10, "apply": False, "divergence": None}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip and accumulate": {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
    "16-mixed": {},
}
KINDS = ["ddp", "in_graph_ddp", "detached_ddp", "in_graph_fsdp2", "detached_fsdp2"]


class Shared(Model):
    """Each rank sees every other sample, in order (Lightning's own sampler shuffles)."""

    def train_dataloader(self) -> DataLoader[Any]:
        data = dataset()
        return DataLoader(data, batch_size=self.batch, sampler=DistributedSampler(data, shuffle=False))


class Divided(Shared):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def _rank(rank: int, folder: Path) -> None:
    enter(rank, folder)
    found: dict[str, Any] = {}
    for kind in KINDS:
        for case, options in CASES.items():
            if "16" in case and "fsdp2" in kind:
                continue  # Lightning's scaler looks at the gradients of one process only
            if "16" in case:
                options = {"plugins": [scaled(init_scale=2.0**40)]}
            results = []
            for finder in (LRFinder(at_epochs=[0, 1], **FINDER), None):
                model = (Divided if "fsdp2" in kind else Shared)(OPTIMIZERS["ours"])
                if "plugins" in options:
                    options = {"plugins": [scaled(init_scale=2.0**40)]}
                callbacks = [] if finder is None else [finder]
                run, noted = fit(
                    model,
                    kind,
                    callbacks=callbacks,
                    devices=RANKS,
                    use_distributed_sampler=False,
                    max_epochs=2,
                    **options,
                )
                assert run.world_size == RANKS
                weights = [
                    {key: getattr(value, "full_tensor", lambda value=value: value)() for key, value in step.items()}
                    for step in noted.weights
                ]
                results.append((weights, noted.lrs, run.precision_plugin.state_dict()))
                if finder is not None:
                    assert finder.test is not None
                    found[f"{kind}, {case}"] = finder.test.losses
            assert_identical(results[0], results[1], f"{kind}, {case}")
    torch.save(found, folder / f"{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("ranks")
    launch(_rank, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_they_agree_and_leave_no_trace(ranks: list[dict[str, list[float]]]) -> None:
    """That the runs are identical is asserted in the processes."""
    here, there = ranks
    assert here == there
    assert len(here) == 3 * len(KINDS) - 2
    for case in CASES:
        for kind in KINDS:
            if (name := f"{kind}, {case}") in here:
                torch.testing.assert_close(torch.tensor(here[name]), torch.tensor(here[f"ddp, {case}"]), **CLOSE)


def test_the_losses_are_those_of_one_process(ranks: list[dict[str, list[float]]]) -> None:
    class InOrder(Model):
        """Both ranks' samples in one batch."""

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(dataset(), batch_size=4)

    finder = LRFinder(at_epochs=[1], **FINDER)
    fit(InOrder(partial(OPTIMIZERS["ours"])), "auto", callbacks=[finder], max_epochs=2)
    assert finder.test is not None
    assert finder.test.losses == pytest.approx(ranks[0]["ddp, plain"], rel=1e-5)
