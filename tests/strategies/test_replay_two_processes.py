"""SAM and line searches over two processes: the same as a plain loop over both ranks' batches, synchronized once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RANKS, enter, launch, leave
from torch.utils.data import DataLoader, DistributedSampler

import lightning_optim.strategies  # noqa: F401 # makes the names known, in every process

from .common import dataset, fit, known_warnings, scaled
from .replayed import BASES, ByHand, assert_weights, noisy_class, sam
from .test_replay_closures import Halving, InALoop, torchs

pytestmark = known_warnings

MAKES: dict[str, Any] = {
    "SAM": sam(),
    "ASAM": sam(adaptive=True),
    "SAM over torch's": sam("foreign"),
    "line search": Halving,
    "LBFGS": torchs,
}
ACCUMULATE = 4
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddp": ("in_graph_ddp", "SAM", {"gradient_clip_val": 0.5}),
    "ddp, ASAM": ("in_graph_ddp", "ASAM", {}),
    "ddp, own step": ("in_graph_ddp", "SAM over torch's", {}),
    "ddp, 16-mixed": ("in_graph_ddp", "SAM", {"gradient_clip_val": 0.5, "plugins": True}),
    "ddp, line search": ("in_graph_ddp", "line search", {}),
    "ddp, LBFGS": ("in_graph_ddp", "LBFGS", {}),
    "fsdp2": ("in_graph_fsdp2", "SAM", {"gradient_clip_val": 0.5}),
    "fsdp2, ASAM": ("in_graph_fsdp2", "ASAM", {}),
}
RESUMED = ["ddp", "fsdp2"]


class Shared(noisy_class()):  # type: ignore[misc]
    """Each rank sees every other batch, in order, and counts what goes between the ranks."""

    reductions = 0

    def train_dataloader(self) -> DataLoader[Any]:
        data = dataset(64)
        return DataLoader(data, batch_size=self.batch, sampler=DistributedSampler(data, shuffle=False))

    def on_train_start(self) -> None:
        ddp = self.trainer.strategy.model
        if isinstance(ddp, torch.nn.parallel.DistributedDataParallel):
            # Not by its name: torch looks at annotations, which here are strings.
            ddp.register_comm_hook(self, lambda module, bucket: _counted(module, bucket))


def _counted(module: Shared, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    module.reductions += bucket.is_last()
    work = dist.all_reduce(bucket.buffer().div_(RANKS), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


class Divided(Shared):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def _rank(rank: int, folder: Path) -> None:
    enter(rank, folder)

    def training(case: str, **more: Any) -> tuple[Any, tuple[Any, ...]]:
        strategy, make, options = CASES[case]
        model = (Divided if "fsdp2" in strategy else Shared)(MAKES[make])
        options = options | {"plugins": [scaled()] if "plugins" in options else None}
        model.overflows = {5} if options["plugins"] else set()
        run, noted = fit(
            model,
            strategy,
            devices=RANKS,
            use_distributed_sampler=False,
            accumulate_grad_batches=ACCUMULATE,
            **options | more,
        )
        weights = [
            {key: getattr(value, "full_tensor", lambda value=value: value)() for key, value in step.items()}
            for step in noted.weights
        ]
        values = getattr(run.optimizers[0], "values", [])
        return run, (weights, model.reductions, model.evaluated, values)

    found: dict[str, Any] = {case: training(case)[1] for case in CASES}
    for case in RESUMED:
        path = folder / f"{case}.ckpt"
        found[f"straight {case}"] = training(case, max_epochs=2)[1]
        training(case)[0].save_checkpoint(path)
        found[f"resumed {case}"] = training(case, max_epochs=2, ckpt_path=path)[1]
    torch.save(found, folder / f"{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("replayed")
    launch(_rank, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


class _Noted:
    def __init__(self, noted: tuple[Any, ...]) -> None:
        self.weights, self.reductions, self.evaluated, self.values = noted


def _in_one_process(case: str) -> ByHand:
    _, make, options = CASES[case]
    common: dict[str, Any] = {"accumulate": ACCUMULATE * RANKS}
    if "plugins" in options:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        scaler.scale(torch.ones(()))
        common |= {"scaler": scaler, "overflows": {5}}
    if make in ("line search", "LBFGS"):
        expected: ByHand = InALoop(MAKES[make], **common)
    else:
        base = BASES["foreign" if "torch" in make else "ours"]
        expected = ByHand(base, clip=options.get("gradient_clip_val"), adaptive=make == "ASAM", **common)
    x, y = dataset(64).tensors
    batch = 4
    # DistributedSampler deals samples out in turn, so that each rank's batches are of every other one.
    batches = [(index, x[rank::RANKS], y[rank::RANKS]) for index in range(8) for rank in range(RANKS)]
    batches = [(i, xs[batch * i : batch * (i + 1)], ys[batch * i : batch * (i + 1)]) for i, xs, ys in batches]
    for at in range(0, len(batches), ACCUMULATE * RANKS):
        expected.weights += [expected._noted()] * (ACCUMULATE - 1)
        expected.step(batches[at : at + ACCUMULATE * RANKS])
        expected.weights.append(expected._noted())
    return expected


@pytest.mark.parametrize("case", CASES)
def test_steps(case: str, ranks: list[dict[str, Any]]) -> None:
    here, there = (_Noted(rank[case]) for rank in ranks)
    for ours, theirs in zip(here.weights, there.weights, strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    close = {"rtol": 1e-5, "atol": 1e-5} if "LBFGS" in case or "search" in case else {"rtol": 1e-6, "atol": 1e-6}
    assert_weights(here, _in_one_process(case), **close)
    assert here.values == there.values  # the same loss, though the ranks have other batches


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_reduced_once_for_each_evaluation(case: str, ranks: list[dict[str, Any]]) -> None:
    for noted in (_Noted(rank[case]) for rank in ranks):
        assert noted.evaluated % ACCUMULATE == 0
        assert noted.reductions == (noted.evaluated // ACCUMULATE if "ddp" in case else 0)


@pytest.mark.parametrize("case", RESUMED)
def test_resuming(case: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found, expected = (_Noted(rank[f"{kind} {case}"]) for kind in ("resumed", "straight"))
        assert len(found.weights) == 8
        for ours, theirs in zip(found.weights, expected.weights[8:], strict=True):
            assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
