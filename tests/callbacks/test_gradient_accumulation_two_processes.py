"""``GradientAccumulation`` in two processes: the gradient of one big batch, reduced once per window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RANKS, enter, launch, leave
from strategies.common import CLOSE, OPTIMIZERS, network
from strategies.common import fit as fit_one
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_optim.strategies  # noqa: F401 # makes the names known, in every process
from lightning_optim.callbacks import GradientAccumulation
from lightning_optim.control.accumulation import Accumulator

from .accumulation import SGD, Ragged, Stream, by_hand, divided, expected_warnings, loss_of, ragged, sam

pytestmark = expected_warnings

COUNT = 5  # batches of a rank in an epoch
WEIGHTED: dict[str, Any] = {"windows": 3, "weigh": "tokens"}
#: Options, and how many batches each step has, of both epochs.
CASES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "alike": ({"windows": 3}, [3, 2] * 2),
    "weighted": (WEIGHTED, [3, 2] * 2),
    "by step, across": (
        WEIGHTED | {"windows": {0: 1, 3: 4}, "by": "step", "across_epochs": True},
        [1, 1, 1, 4, 3],
    ),
    "stream": (WEIGHTED, [3, 2] * 2),
}
KINDS = ["ddp", "in_graph_ddp", "detached_ddp", "fsdp2", "in_graph_fsdp2", "detached_fsdp2"]
#: What is run: everything under DDP; elsewhere what differs.
RUN = [(kind, case) for kind in KINDS for case in CASES if kind == "ddp" or case in ("weighted", "by step, across")]


def of_rank(rank: int) -> list[dict[str, Any]]:
    """Every other batch; those of a rank weigh other numbers of tokens than the other's."""
    return ragged(RANKS * COUNT)[rank::RANKS]


class Shared(Ragged):
    def train_dataloader(self) -> DataLoader[Any]:
        data = of_rank(self.trainer.global_rank)
        return DataLoader(Stream(data) if self.stream else data, batch_size=None)  # type: ignore[arg-type]

    def on_train_start(self) -> None:
        self.reductions = 0
        if isinstance(self.trainer.model, torch.nn.parallel.DistributedDataParallel):
            # A function without annotations, which DDP would compare with classes.
            self.trainer.model.register_comm_hook(self, lambda model, bucket: _count(model, bucket))


class Divided(Shared):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def _count(model: Shared, bucket: Any) -> Any:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model.reductions += bucket.is_last()
    return allreduce_hook(None, bucket)  # type: ignore[arg-type] # None: the default group


def _whole(step: dict[str, Any]) -> dict[str, Tensor]:
    return {key: getattr(value, "full_tensor", lambda value=value: value)() for key, value in step.items()}


def _plain_loop(rank: int) -> list[dict[str, Tensor]]:
    """The accumulator in a loop around DDP."""
    net = network()
    ddp = torch.nn.parallel.DistributedDataParallel(net)
    optimizer, accumulator, steps = SGD(net.parameters()), Accumulator(**WEIGHTED), []
    for batch in accumulator.batches(of_rank(rank)):
        with accumulator.sync(ddp):
            accumulator.share(loss_of(ddp, batch), batch, net.parameters()).backward()
        if accumulator.steps:
            optimizer.step()
            optimizer.zero_grad()
            steps.append({f"net.{name}": p.detach().clone() for name, p in net.named_parameters()})
    return steps


def _rank(rank: int, folder: Path) -> None:
    enter(rank, folder)
    from lightning.pytorch.strategies import ModelParallelStrategy

    def training(kind: str, options: dict[str, Any], make: Any = SGD, **more: Any) -> dict[str, Any]:
        model = (Divided if "fsdp2" in kind else Shared)(make, stream=more.pop("stream", False))
        strategy: Any = kind if kind != "fsdp2" else ModelParallelStrategy(RANKS, 1)
        settings = {"devices": RANKS, "use_distributed_sampler": False, "max_epochs": 2} | more
        run, noted = fit_one(model, strategy, callbacks=[GradientAccumulation(**options)], **settings)
        assert run.world_size == RANKS
        return {
            "weights": list(map(_whole, noted.weights)),
            "lrs": noted.lrs,
            "steps": run.global_step,
            "estimated": model.estimated,
            "reductions": model.reductions,
        }

    found: dict[tuple[str, ...], Any] = {("loop",): _plain_loop(rank)}
    for kind, case in RUN:
        found[kind, case] = training(kind, CASES[case][0], stream=case == "stream", gradient_clip_val=2.0)
    for kind in ("in_graph_ddp", "in_graph_fsdp2"):
        found[kind, "sam"] = training(kind, WEIGHTED, sam, max_epochs=1)
    found["ddp", "adamw"] = training("ddp", WEIGHTED, OPTIMIZERS["ours"], max_epochs=1)
    torch.save(found, folder / f"{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    launch(_rank, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def windows(lengths: list[int], epochs: int = 2) -> list[list[dict[str, Any]]]:
    """The batches of both ranks, by step."""
    return divided(ragged(RANKS * COUNT) * epochs, *(RANKS * length for length in lengths))


def after_steps(found: dict[str, Any], lengths: list[int]) -> list[dict[str, Tensor]]:
    """The weights after the last batch of each window."""
    return [found["weights"][sum(lengths[: i + 1]) - 1] for i in range(len(lengths))]


@pytest.mark.parametrize(("kind", "case"), RUN)
def test_a_step_is_that_of_one_big_batch(kind: str, case: str, ranks: list[dict[Any, Any]]) -> None:
    options, lengths = CASES[case]
    for rank in ranks:
        found = rank[kind, case]
        expected = by_hand(windows(lengths), weighted="weigh" in options, clip=2.0)
        torch.testing.assert_close(after_steps(found, lengths), expected, **CLOSE)
        assert found["steps"] == len(lengths)
        assert found["estimated"] == (-1 if case == "stream" else len(lengths))
        assert found["lrs"][-1] == pytest.approx(0.05 / (1 + len(lengths)))


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, case in RUN if "ddp" in kind])
def test_gradients_are_reduced_once_per_window(kind: str, case: str, ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        assert rank[kind, case]["reductions"] == len(CASES[case][1])


def test_a_plain_loop_around_ddp(ranks: list[dict[Any, Any]]) -> None:
    for rank in ranks:
        expected = by_hand(windows([3, 2], 1), weighted=True, decays=False)
        torch.testing.assert_close(rank[("loop",)], expected, **CLOSE)


def test_sam_and_adamw(ranks: list[dict[Any, Any]]) -> None:
    """SAM as in one process with the batches of both; AdamW, whose small gradients count as much, nearly."""

    class Both(Ragged):
        def train_dataloader(self) -> DataLoader[Any]:
            pairs = divided(ragged(RANKS * COUNT), *[RANKS] * COUNT)
            both = [{key: torch.cat([one[key] for one in pair]) for key in ("x", "y")} for pair in pairs]
            data = [batch | {"tokens": len(batch["x"])} for batch in both]
            return DataLoader(data, batch_size=None)  # type: ignore[arg-type]

    _, alone = fit_one(Both(sam), "in_graph", callbacks=[GradientAccumulation(**WEIGHTED)])
    for rank in ranks:
        for kind in ("in_graph_ddp", "in_graph_fsdp2"):
            torch.testing.assert_close(rank[kind, "sam"]["weights"], alone.weights, rtol=1e-5, atol=1e-5)
        expected = by_hand(windows([3, 2], 1), OPTIMIZERS["ours"], weighted=True)
        torch.testing.assert_close(after_steps(rank["ddp", "adamw"], [3, 2]), expected, rtol=1e-4, atol=1e-4)
