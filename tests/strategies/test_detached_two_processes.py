"""``detached_ddp`` and ``detached_fsdp2`` in two processes, against Lightning's own strategies and masters by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RANKS, enter, launch, leave

import lightning_optim.strategies  # noqa: F401 # makes the names known, in every process

from .common import OPTIMIZERS, assert_same_state, assert_same_steps, fit, known_warnings, scaled
from .masters import ByHand, Straight
from .test_two_processes import Divided, Shared, _Noted

pytestmark = known_warnings

CLIP = {"gradient_clip_val": 0.5}
NAMES = ["ours", "torch AdamW", "foreign"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip and accumulate": CLIP | {"accumulate_grad_batches": 2},
    "16-mixed, clip": CLIP,
}
PAIRS = [("ddp", "detached_ddp"), ("detached_ddp", "ddp"), ("detached_ddp", "detached_ddp")]
DIVIDED = [("fsdp2", "detached_fsdp2"), ("detached_fsdp2", "fsdp2")]


class SharedStraight(Straight):
    train_dataloader = Shared.train_dataloader


class DividedStraight(SharedStraight):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def _whole(step: dict[str, Any]) -> dict[str, Any]:
    return {key: getattr(value, "full_tensor", lambda value=value: value)() for key, value in step.items()}


def _rank(rank: int, folder: Path) -> None:
    enter(rank, folder)
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategies: dict[str, Any] = {
        "detached_ddp": lambda: "detached_ddp",
        "ddp": lambda: "ddp",
        "detached_fsdp2": lambda: "detached_fsdp2",
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1),
    }

    def training(kind: str, model: Any, **options: Any) -> tuple[Any, tuple[Any, ...]]:
        run, noted = fit(model, strategies[kind](), devices=RANKS, use_distributed_sampler=False, **options)
        report = run.strategy.report() if "detached" in kind else ""
        return run, (list(map(_whole, noted.weights)), noted.lrs, run.precision_plugin.state_dict(), report)

    found: dict[tuple[str, ...], Any] = {}
    for kind in strategies:
        for case, options in CASES.items():
            for name in NAMES:
                if "16" in case and kind == "fsdp2":
                    continue  # Lightning's own scaler looks at the gradients of one process only
                model = (Divided if "fsdp2" in kind else Shared)(OPTIMIZERS[name])
                model.overflows = {2} if "16" in case else set()
                plugins = [scaled()] if "16" in case else None
                found[kind, case, name] = training(kind, model, plugins=plugins, **options)[1]
    make = partial(torch.optim.AdamW, lr=0.05)
    for kind in ("detached_ddp", "detached_fsdp2"):
        model = (DividedStraight if "fsdp2" in kind else SharedStraight)(make)
        run, noted = training(kind, model, precision="bf16-true", **CLIP)
        run.save_checkpoint(folder / f"bfloat16 {kind}")
        found[kind, "bfloat16"] = noted
    for name in NAMES[:2]:
        for first, second in (*PAIRS, *DIVIDED):
            cls = Divided if "fsdp2" in first else Shared
            path = folder / f"{first} {second} {name}"
            training(first, cls(OPTIMIZERS[name]))[0].save_checkpoint(path)
            run, noted = training(second, cls(OPTIMIZERS[name]), max_epochs=2, ckpt_path=path)
            found[first, second, name] = noted
            if "fsdp2" not in first:
                state = run.strategy.optimizer_state(run.optimizers[0])
                found["state", first, second, name] = state if rank == 0 else None
        for kind in ("ddp", "fsdp2"):
            cls = Divided if "fsdp2" in kind else Shared
            run, noted = training(kind, cls(OPTIMIZERS[name]), max_epochs=2)
            found["straight", kind, name] = noted
            if kind == "ddp":
                found["state", kind, name] = run.optimizers[0].state_dict() if rank == 0 else None
    torch.save(found, folder / f"{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[Any, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    launch(_rank, folder)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


Ranks = tuple[Path, list[dict[Any, Any]]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind: str, case: str, name: str, ranks: Ranks) -> None:
    here, there = (_Noted(rank[f"detached_{kind}", case, name]) for rank in ranks[1])
    assert_same_steps(here, there, rtol=0, atol=0)
    assert here.scaler == there.scaler
    assert ("own step" in here.report) == (name == "foreign")
    stock = _Noted(ranks[1][0]["ddp" if "16" in case else kind, case, name])
    if "16" in case:
        # Lightning's schedules count the step that was left out.
        assert here.scaler == stock.scaler
        stock.weights, here.weights = stock.weights[:3], here.weights[:3]  # before lrs differ
        here.lrs = stock.lrs
    assert_same_steps(here, stock)


@pytest.mark.parametrize("kind", ["detached_ddp", "detached_fsdp2"])
def test_bfloat16_weights(kind: str, ranks: Ranks) -> None:
    """Masters divided over two processes are those of one process that has both halves of every batch."""
    found = _Noted(ranks[1][0][kind, "bfloat16"])
    averaged = partial(ByHand, make=partial(torch.optim.AdamW, lr=0.05), max_norm=0.5)
    _, expected = fit(_Both(averaged), "auto", precision="bf16-true")
    # Gradients are averaged in bfloat16 there, and in float32 here: 1/256 of each, and so of an update of 0.05.
    for step, other in zip(found.weights, expected.weights, strict=True):
        for key in step:
            torch.testing.assert_close(step[key], other[key], rtol=1 / 64, atol=2e-3)


class _Both(Straight):
    """The mean of the losses of the two ranks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batch = 4

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
        x, y = batch
        halves = [super(_Both, self).training_step([x[rank::2], y[rank::2]], batch_idx) for rank in range(RANKS)]
        return torch.stack(halves).mean()


@pytest.mark.parametrize("kind", ["detached_ddp", "detached_fsdp2"])
def test_checkpoints_have_whole_masters(kind: str, ranks: Ranks) -> None:
    path = ranks[0] / f"bfloat16 {kind}"
    saved = torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)
    masters = saved["detached_masters"][0]
    weights = ranks[1][0][kind, "bfloat16"][0][-1]
    assert masters.keys() == weights.keys()
    for name, weight in weights.items():
        assert masters[name].dtype == torch.float32
        assert torch.equal(masters[name].bfloat16(), weight)
    assert any(not torch.equal(masters[name], weight.float()) for name, weight in weights.items())


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize(("first", "second"), [*PAIRS, *DIVIDED])
def test_resuming(first: str, second: str, name: str, ranks: Ranks) -> None:
    found = _Noted(ranks[1][0][first, second, name])
    expected = _Noted(ranks[1][0]["straight", "fsdp2" if "fsdp2" in first else "ddp", name])
    expected.weights, expected.lrs = expected.weights[4:], expected.lrs[4:]
    assert_same_steps(found, expected)


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_the_whole_state_is_saved(first: str, second: str, name: str, ranks: Ranks) -> None:
    assert_same_state(ranks[1][0]["state", first, second, name], ranks[1][0]["state", "ddp", name])
