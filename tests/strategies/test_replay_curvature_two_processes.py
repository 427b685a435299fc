"""Second derivatives over two processes: the means over both ranks' batches; FSDP2 and detached ones are refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations.common import Curious
from ranks import RANKS, enter, launch, leave
from torch import Tensor

import lightning_optim.strategies  # makes the names known, in every process

from .common import dataset, fit, known_warnings
from .test_replay_curvature import ByHand, sophia
from .test_replay_two_processes import Divided, Shared

pytestmark = known_warnings

ACCUMULATE = 2
MAKES: dict[str, Any] = {"products": Curious, "sophia": sophia}
REFUSED = {"in_graph_fsdp2": "differentiated once only", "detached_ddp": "masters"}


def _rank(rank: int, folder: Path) -> None:
    enter(rank, folder)
    found: dict[str, Any] = {}
    for name, make in MAKES.items():
        model = Shared(make)
        run, noted = fit(
            model, "in_graph_ddp", devices=RANKS, use_distributed_sampler=False, accumulate_grad_batches=ACCUMULATE
        )
        products = getattr(run.optimizers[0], "found", [])
        state = run.optimizers[0].state_dict()
        found[name] = noted.weights, products, model.reductions, state["state"]
    for strategy in REFUSED:
        model = (Divided if "fsdp2" in strategy else Shared)(partial(lightning_optim.Sophia, lr=0.01))
        try:
            fit(model, strategy, devices=RANKS, use_distributed_sampler=False)
        except ValueError as error:
            found[strategy] = str(error)
    torch.save(found, folder / f"{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("curvature")
    launch(_rank, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def _in_one_process(make: Any) -> ByHand:
    expected = ByHand(make, ACCUMULATE * RANKS)
    x, y = dataset(64).tensors
    # DistributedSampler deals samples out in turn, so that each rank's batches are of every other one.
    batches: list[tuple[int, Tensor, Tensor]] = []
    for index in range(8):
        for rank in range(RANKS):
            mine = slice(4 * index * RANKS + rank, 4 * (index + 1) * RANKS, RANKS)
            batches.append((index, x[mine], y[mine]))
    for at in range(0, len(batches), ACCUMULATE * RANKS):
        expected.step(batches[at : at + ACCUMULATE * RANKS])
    return expected


@pytest.mark.parametrize("name", MAKES)
def test_ddp(name: str, ranks: list[dict[str, Any]]) -> None:
    """The same bits on both, the estimate of both ranks' data, and no exchange of gradients for it."""
    (weights, products, reductions, state), (others, other_products, _, other_state) = (rank[name] for rank in ranks)
    expected = _in_one_process(MAKES[name])
    for key, value in weights[-1].items():
        assert torch.equal(value, others[-1][key])
        torch.testing.assert_close(value, expected.net.state_dict()[key.removeprefix("net.")], rtol=1e-5, atol=1e-5)
    assert reductions == 8 // ACCUMULATE
    for key, slots in state.items():
        assert all(torch.equal(value, other_state[key][slot]) for slot, value in slots.items())
    for step, other_step, made in zip(products, other_products, getattr(expected.optimizer, "found", []), strict=True):
        for one, other, value in zip(step, other_step, made, strict=True):
            assert torch.equal(one, other)
            torch.testing.assert_close(one, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", REFUSED)
def test_what_is_refused(strategy: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "Sophia" in rank[strategy]
        assert REFUSED[strategy] in rank[strategy]
        assert "valid: " in rank[strategy]
