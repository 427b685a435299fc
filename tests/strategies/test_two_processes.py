"""``in_graph_ddp`` and ``in_graph_fsdp2`` in two processes, against Lightning's own strategies and a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RANKS, enter, launch, leave
from torch.utils.data import DataLoader, DistributedSampler

import lightning_optim.strategies  # noqa: F401 # makes the names known, in every process

from .common import OPTIMIZERS, Model, assert_same_steps, dataset, fit, known_warnings, scaled

pytestmark = known_warnings

CLIP = {"gradient_clip_val": 0.5}
NAMES = ["ours", "torch AdamW", "foreign"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip and accumulate": CLIP | {"accumulate_grad_batches": 2},
    "16-mixed, clip": CLIP,
}
RESUMED = [("fsdp2", "in_graph_fsdp2"), ("in_graph_fsdp2", "fsdp2")]


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
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategies: dict[str, Any] = {
        "in_graph_ddp": lambda: "in_graph_ddp",
        "ddp": lambda: "ddp",
        "in_graph_fsdp2": lambda: "in_graph_fsdp2",
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1),
    }

    def training(kind: str, case: str, name: str, **more: Any) -> tuple[Any, tuple[Any, ...]]:
        model = (Divided if "fsdp2" in kind else Shared)(OPTIMIZERS[name])
        model.overflows = {2} if "16" in case else set()
        plugins = [scaled()] if "16" in case else None
        options = {"devices": RANKS, "use_distributed_sampler": False, "plugins": plugins} | CASES[case] | more
        run, noted = fit(model, strategies[kind](), **options)
        assert run.world_size == RANKS
        weights = [
            {key: getattr(value, "full_tensor", lambda value=value: value)() for key, value in step.items()}
            for step in noted.weights
        ]
        report = run.strategy.report() if "in_graph" in kind else ""
        return run, (weights, noted.lrs, run.precision_plugin.state_dict(), report)

    found: dict[tuple[str, str, str], Any] = {}
    for kind in strategies:
        for case in CASES:
            for name in NAMES:
                # Lightning's own scaler looks at the gradients of one process only.
                if "16" not in case or kind != "fsdp2":
                    found[kind, case, name] = training(kind, case, name)[1]
    for name in NAMES[:2]:
        found["straight", "plain", name] = training("fsdp2", "plain", name, max_epochs=2)[1]
        for first, second in RESUMED:
            path = folder / f"{first} {name}"
            training(first, "plain", name)[0].save_checkpoint(path)
            found[first, second, name] = training(second, "plain", name, max_epochs=2, ckpt_path=path)[1]
    torch.save(found, folder / f"{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    launch(_rank, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


class _Noted:
    def __init__(self, noted: tuple[Any, ...]) -> None:
        self.weights, self.lrs, self.scaler, self.report = noted


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind: str, case: str, name: str, ranks: list[dict[Any, Any]]) -> None:
    here, there = (_Noted(rank[f"in_graph_{kind}", case, name]) for rank in ranks)
    assert_same_steps(here, there, rtol=0, atol=0)
    assert here.scaler == there.scaler
    assert ("runs its own step" in here.report) == (name == "foreign")
    if name != "foreign":
        assert "eager" not in here.report
    stock = _Noted(ranks[0]["ddp" if "16" in case else kind, case, name])
    if "16" in case:
        # Lightning's schedules count the step that was left out.
        assert len(set(here.lrs)) == len(stock.lrs) - 1
        stock.lrs = here.lrs
        assert here.scaler == stock.scaler
        assert here.scaler["scale"] == 128.0
        stock.weights, here.weights = stock.weights[:3], here.weights[:3]  # before lrs differ
        here.lrs = stock.lrs
    assert_same_steps(here, stock)


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize(("first", "second"), RESUMED)
def test_resuming_what_is_divided(first: str, second: str, name: str, ranks: list[dict[Any, Any]]) -> None:
    """Distributed checkpoints too are those of Lightning's own strategy."""
    found, expected = _Noted(ranks[0][first, second, name]), _Noted(ranks[0]["straight", "plain", name])
    expected.weights, expected.lrs = expected.weights[4:], expected.lrs[4:]
    assert_same_steps(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_as_in_one_process(name: str, ranks: list[dict[Any, Any]]) -> None:
    class InOrder(Model):
        """Both ranks' samples in one batch."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.batch = 4

    _, expected = fit(InOrder(OPTIMIZERS[name]), "auto", gradient_clip_val=0.5, accumulate_grad_batches=2)
    for kind in ("in_graph_ddp", "in_graph_fsdp2"):
        found = _Noted(ranks[0][kind, "clip and accumulate", name])
        # Averages of two halves, in float32: a little further apart than the same sums.
        assert_same_steps(found, expected, rtol=1e-5, atol=1e-5)
