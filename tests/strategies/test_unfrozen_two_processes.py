"""Layers that are unfrozen after DDP was set up, which does not know of them: in two processes, as in one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BaseFinetuning
from ranks import RANKS, enter, launch, leave
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lightning_optim
import lightning_optim.strategies  # makes the names known, in every process
from lightning_optim.control.unreduced import Unreduced

from .common import Model, assert_same_steps, fit, known_warnings
from .test_two_processes import Shared, _Noted

pytestmark = known_warnings

KINDS = ["in_graph_ddp", "detached_ddp"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip and accumulate": {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
    "sam": {"accumulate_grad_batches": 2},
}


class Unfreezes(BaseFinetuning):
    """Lightning's own way: the layer is frozen before the strategy is set up, and joins at the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.05)


def _configure(model: Any) -> Any:
    def optimizer(params: Any) -> Any:
        return lightning_optim.SGD(params, lr=0.05, momentum=0.9)

    model.configure_optimizers = lambda: model.make(p for p in model.parameters() if p.requires_grad)
    model.make = (lambda params: lightning_optim.SAM(params, optimizer)) if model.case == "sam" else optimizer
    return model


def _training(model: Any, case: str, strategy: str, **options: Any) -> Any:
    model.case = case
    callbacks = [Unfreezes()]
    return fit(_configure(model), strategy, callbacks=callbacks, max_epochs=3, **CASES[case] | options)[1]


class _Parts(nn.Module):
    """Parts that DDP knows, and that it does not."""

    short: nn.Parameter
    lone: nn.Parameter
    none: nn.Parameter
    wave: nn.Parameter

    def __init__(self, rank: int) -> None:
        super().__init__()
        kinds = {"short": torch.bfloat16, "lone": torch.float32, "none": torch.float32, "wave": torch.complex64}
        self.known, self.part = nn.Parameter(torch.ones(3)), nn.Linear(2, 1, bias=False)
        for name, dtype in kinds.items():
            self.register_parameter(name, nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False))
        self.table = nn.Embedding(4, 2, sparse=True).requires_grad_(False)
        self.rank = rank
        self._ddp_params_and_buffers_to_ignore = ["part.weight"]

    def forward(self, scale: float) -> Any:
        mine = scale * (1 + self.rank)
        loss = mine * (self.known.sum() + self.short.float().sum() + self.wave.real.sum() + self.part.weight.sum())
        return loss + mine * self.lone.sum() if self.rank == 0 else loss


def _neutral(rank: int) -> dict[str, Any]:
    module = _Parts(rank)
    ddp = DistributedDataParallel(module)
    unreduced = Unreduced(ddp)
    sgd = torch.optim.SGD([module.known, module.part.weight], lr=0.1)
    found: dict[str, Any] = {"nothing new": unreduced.parameters([sgd])}
    names = ("short", "lone", "none", "wave")
    for name in names:
        getattr(module, name).requires_grad_()
    sgd.add_param_group({"params": [getattr(module, name) for name in names]})
    found["ignored"] = unreduced.ignored([sgd])

    def backward(scale: float) -> None:
        loss = ddp(scale)
        unreduced.average_after(loss, [sgd])
        loss.backward()

    with ddp.no_sync():
        backward(1.0)
    found["in the window"] = copy.deepcopy(module.short.grad)
    backward(2.0)
    grads = {name: getattr(module, name).grad for name in ("known", *names)}
    found["grads"] = copy.deepcopy(grads | {"alone": module.part.weight.grad})
    late = nn.Parameter(torch.full((2,), float(rank)))
    sgd.add_param_group({"params": [late]})
    found["late"] = _message(lambda: unreduced.average([sgd]))
    sgd.param_groups.pop()
    sgd.add_param_group({"params": [nn.Parameter(torch.full((2,), 7.0))]})  # made later, and alike: welcome
    backward(1.0)
    sgd.add_param_group({"params": module.table.requires_grad_().parameters()})
    module.table(torch.tensor([1])).sum().backward()
    found["sparse"] = _message(lambda: unreduced.average([sgd]))
    return found


def _message(call: Any) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "no error"


def _ignoring() -> Any:
    model = Shared()
    model._ddp_params_and_buffers_to_ignore = ["net.0.weight"]
    return model


def _rank(rank: int, folder: Path) -> None:
    enter(rank, folder)
    found: dict[Any, Any] = {}
    for kind in KINDS:
        for case in CASES:
            noted = _training(Shared(), case, kind, devices=RANKS, use_distributed_sampler=False)
            found[kind, case] = (noted.weights, noted.lrs, None, "")
    try:
        fit(_ignoring(), "detached_ddp", devices=RANKS, use_distributed_sampler=False)
    except ValueError as error:
        found["ignored"] = str(error)
    found["neutral"] = _neutral(rank)
    dist.barrier()
    torch.save(found, folder / f"{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = launch(_rank, tmp_path_factory.mktemp("ranks"))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_unfrozen_layer_is_averaged_as_all_others(kind: str, case: str, ranks: list[dict[Any, Any]]) -> None:
    here, there = (_Noted(rank[kind, case]) for rank in ranks)
    assert_same_steps(here, there, rtol=0, atol=0)
    expected = _training(Model(batch=4), case, "in_graph")
    assert not torch.equal(expected.weights[-1]["net.0.weight"], expected.weights[0]["net.0.weight"])
    # Averages of two halves, in float32: a little further apart than the same sums.
    assert_same_steps(here, expected, rtol=1e-5, atol=1e-5)


def test_means_of_a_window_with_gradients_that_only_one_process_has(ranks: list[dict[Any, Any]]) -> None:
    for rank, found in enumerate(entry["neutral"] for entry in ranks):
        assert found["nothing new"] == []
        assert found["in the window"].tolist() == [1.0 + rank] * 3  # each its own, as in DDP
        grads = found["grads"]
        for name, value in {"known": 4.5, "short": 4.5, "wave": 4.5, "lone": 1.5}.items():
            assert grads[name].tolist() == [value] * 3, name
        assert grads["none"] is None
        assert grads["alone"].flatten().tolist() == [3.0 * (1 + rank)] * 2  # DDP was told to leave it alone


def test_what_cannot_be_averaged_is_named_in_all_processes(ranks: list[dict[Any, Any]]) -> None:
    for entry in ranks:
        found = entry["neutral"]
        assert (
            "a parameter of shape (2,) came to the optimizer after DDP was set up, with other values" in found["late"]
        )
        assert "DDP does not know table.weight" in found["sparse"]
        assert found["ignored"] == ["part.weight"]
        assert "detached_ddp: DDP was told to leave the gradients of net.0.weight to each process" in entry["ignored"]
