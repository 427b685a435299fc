"""Two processes: DDP and FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import RANKS, enter, launch, leave
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import DataLoader, DistributedSampler

from lightning_optim import optimizer_info
from lightning_optim.registry import OPTIMIZERS

from .common import (
    UNIQUE,
    Model,
    Net,
    asking,
    asks_for_evaluations,
    assert_close,
    assert_same_state,
    by_gradient,
    by_hand,
    dataset,
    each,
    fit,
    known_warnings,
    maker,
    train,
)

pytestmark = known_warnings

SHARDED: dict[str, dict[str, Any]] = {"plain": {}, "clipped": {"max_grad_norm": 0.3}, "cautious": {"cautious": True}}
SHARDED_CASES = [
    (name, case)
    for name in sorted(OPTIMIZERS)
    for case, options in SHARDED.items()
    if set(options) <= set(optimizer_info(name).options) and not asks_for_evaluations(optimizer_info(name).cls)
]


class Shared(Model):
    """Each rank sees every other sample, in order (Lightning's own sampler shuffles)."""

    def train_dataloader(self) -> DataLoader[Any]:
        data = dataset(dtype=self.data_dtype)
        return DataLoader(data, batch_size=self.batch, sampler=DistributedSampler(data, shuffle=False))


def ddp_rank(rank: int, folder: Path) -> None:
    """Trainer with DDP: each rank sees half of every batch."""
    enter(rank, folder)
    found = {}
    for name in sorted(OPTIMIZERS):
        model = Shared(maker(name, **UNIQUE.get(name, {})), torch.float64, batch=2)
        strategy = "in_graph_ddp" if asks_for_evaluations(optimizer_info(name).cls) else "ddp"
        run = fit(folder, model, strategy=strategy, devices=RANKS, use_distributed_sampler=False)
        assert run.world_size == RANKS
        found[name] = model.net.state_dict(), run.optimizers[0].state_dict()
    torch.save(found, folder / f"ddp{rank}.pt")
    leave()


def fsdp2_rank(rank: int, folder: Path) -> None:
    """``fully_shard``: parameters, gradients and state are DTensors; the last layer's bias is on one rank only."""
    from torch.distributed.fsdp import fully_shard

    enter(rank, folder)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    found: dict[tuple[str, str], Any] = {}
    for name, case in SHARDED_CASES:
        net = Net(torch.float64)
        fully_shard(net, mesh=mesh)
        optimizer = maker(name, **SHARDED[case])(net.parameters())
        train(net, optimizer, range(4))
        full = StateDictOptions(full_state_dict=True)
        state = get_optimizer_state_dict(net, optimizer, options=full)
        found[name, case] = get_model_state_dict(net, options=full), state
        if case == "plain":
            assert optimizer_info(name).kind == "reduce" or "eager" not in optimizer.engine_report()
            sharded = get_optimizer_state_dict(net, optimizer)
            dcp.save({"model": get_model_state_dict(net), "optimizer": sharded}, checkpoint_id=folder / name)
    refused: dict[str, str] = {}
    for name in sorted(set(OPTIMIZERS) - {name for name, _ in SHARDED_CASES}):
        net = Net(torch.float64)
        fully_shard(net, mesh=mesh)
        try:
            train(net, maker(name)(net.parameters()), range(1))
        except RuntimeError as error:
            refused[name] = str(error)
    if rank == 0:
        torch.save(found, folder / "fsdp2.pt")
        torch.save(refused, folder / "refused.pt")
    leave()


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = launch(ddp_rank, tmp_path_factory.mktemp("ddp"))
    return [torch.load(folder / f"ddp{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], Any]]:
    folder = launch(fsdp2_rank, tmp_path_factory.mktemp("fsdp2"))
    return folder, torch.load(folder / "fsdp2.pt", weights_only=True)


@each
def test_ddp(name: str, ddp: list[dict[str, Any]]) -> None:
    """Both ranks have the same bits, and those of one process with the whole batch to rounding."""
    (weights, state), (other_weights, other_state) = (rank[name] for rank in ddp)
    assert_close(weights, other_weights, rtol=0, atol=0)
    assert_same_state(state, other_state)
    net, _ = by_hand(maker(name, **UNIQUE.get(name, {})))
    assert_close(weights, net.state_dict())


@pytest.mark.parametrize(("name", "case"), SHARDED_CASES)
def test_fsdp2(name: str, case: str, fsdp2: tuple[Path, dict[tuple[str, str], Any]]) -> None:
    """Norms are those of the whole tensors and of the whole model, not of a shard."""
    weights, state = fsdp2[1][name, case]
    net = Net(torch.float64)
    optimizer = maker(name, **SHARDED[case])(net.parameters())
    train(net, optimizer, range(4))
    assert_close(weights, net.state_dict())
    for key, p in net.named_parameters():
        assert_close(state["state"][key], optimizer.state[p])


@asking
def test_fsdp2_refuses_second_derivatives(name: str, fsdp2: tuple[Path, dict[tuple[str, str], Any]]) -> None:
    refused = torch.load(fsdp2[0] / "refused.pt", weights_only=True)
    assert "second derivative of sharded parameters" in refused[name]
    assert "valid: " in refused[name]


@by_gradient
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_fsdp2_checkpoint_in_one_process(name: str, fsdp2: tuple[Path, dict[tuple[str, str], Any]]) -> None:
    """What two ranks saved in shards goes on whole in a single process."""
    expected = Net(torch.float64)
    reference = maker(name)(expected.parameters())
    train(expected, reference, range(4))
    net = Net(torch.float64)
    optimizer = maker(name)(net.parameters())
    target: dict[str, Any] = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.load(target, checkpoint_id=fsdp2[0] / name, no_dist=True)
    set_model_state_dict(net, target["model"])
    set_optimizer_state_dict(net, optimizer, target["optimizer"])
    for one, other in ((net, optimizer), (expected, reference)):
        train(one, other, range(4, 6))
    assert_close(net.state_dict(), expected.state_dict())
