"""``GradientClipping`` in two processes: norms of gradients that are averaged (DDP) or divided (FSDP1, FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from control.clipping_references import WAYS
from ranks import RANKS, enter, launch, leave
from strategies.common import Model, assert_same_steps, fit, known_warnings, scaled
from strategies.test_two_processes import Divided, Shared
from torch import Tensor, nn

import lightning_optim.strategies  # noqa: F401 # makes the names known, in every process
from lightning_optim.callbacks import GradientClipping
from lightning_optim.control.clipping import GradientClipper, NonfiniteGradientError

pytestmark = known_warnings

STRATEGIES = ["ddp", "in_graph_ddp", "detached_ddp", "fsdp2", "in_graph_fsdp2", "detached_fsdp2"]
SGD = partial(torch.optim.SGD, lr=0.05)
OPTIONS: dict[str, Any] = {"devices": RANKS, "use_distributed_sampler": False, "log_every_n_steps": 1}


class Overflowing(Divided):
    """A gradient that is NaN in the part of one process alone."""

    def on_after_backward(self) -> None:
        if self.global_rank == 0:
            self.net[3].weight.grad.to_local().fill_(float("nan"))


def _strategy(kind: str) -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1) if kind == "fsdp2" else kind


def _whole(noted: Any) -> list[dict[str, Tensor]]:
    return [
        {key: getattr(value, "full_tensor", lambda value=value: value)() for key, value in step.items()}
        for step in noted.weights
    ]


def _rank(rank: int, folder: Path) -> None:
    enter(rank, folder)
    found: dict[Any, Any] = {}

    def training(kind: str, callback: Any, precision: str = "32-true", **more: Any) -> Any:
        model = (Divided if "fsdp2" in kind else Shared)(SGD)
        options = {"plugins": [scaled()]} if precision == "16-mixed" else {"precision": precision}
        run, noted = fit(model, _strategy(kind), callbacks=[callback], **OPTIONS | options | more)
        logged = {key: float(value) for key, value in run.callback_metrics.items()}
        return run, (_whole(noted), noted.lrs, logged, callback.state_dict())

    for kind in STRATEGIES:
        for way in WAYS:
            callback = GradientClipping(**WAYS[way][0], log=True)
            found[kind, way] = training(kind, callback, accumulate_grad_batches=2)[1]
        for way in ("max_norm", "agc"):
            if kind != "fsdp2":  # Lightning's own scaler looks at the gradients of one process only
                found[kind, way, "16"] = training(kind, GradientClipping(**WAYS[way][0]), "16-mixed")[1]
        if "fsdp2" in kind:
            callback = GradientClipping(max_norm=0.5, error_if_nonfinite=True)
            with pytest.raises(NonfiniteGradientError, match=r"infinite or NaN: those of net.3.weight \(of 6 param"):
                fit(Overflowing(SGD), _strategy(kind), callbacks=[callback], **OPTIONS)
    for way, where in product(WAYS, PLACEMENTS):
        found["in parts", way, where] = _in_parts(way, where)
    for kind in ("fsdp2", "in_graph_fsdp2"):
        path = folder / f"{kind}.ckpt"
        training(kind, GradientClipping(**WAYS["adagc"][0]))[0].save_checkpoint(path)
        again = GradientClipping(**WAYS["adagc"][0])
        found[kind, "resumed"] = training(kind, again, max_epochs=2, ckpt_path=path)[1]
        found[kind, "straight"] = training(kind, GradientClipping(**WAYS["adagc"][0]), max_epochs=2)[1]
    torch.save(found, folder / f"{rank}.pt")
    leave()


def _in_parts(way: str, where: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """A plain loop over tensors that are divided by rows, by columns (as for tensor parallelism), or not at all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))

    def divided(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [PLACEMENTS[where](tensor.ndim)])

    params = [nn.Parameter(divided(tensor)) for tensor in _tensors(0)]
    clipper = GradientClipper(**WAYS[way][0])
    for step in range(3):
        for p, gradient in zip(params, _tensors(1 + step), strict=True):
            p.grad = divided(gradient * (1 + step))
        clipped = clipper.clip(params)
    return [p.grad.full_tensor() for p in params], vars(clipped)  # type: ignore[union-attr]


def _tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((5, 3), (4,), (3, 2, 2), (1,))]


def _shard(dim: int) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(dim)


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


PLACEMENTS: dict[str, Callable[[int], Any]] = {
    "by rows": lambda ndim: _shard(0),
    "by columns": lambda ndim: _shard(ndim - 1),
    "not at all": lambda ndim: _replicate(),
}


class InOrder(Model):
    """Both ranks' samples in one batch."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batch = 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = launch(_rank, tmp_path_factory.mktemp("ranks"))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


class _Noted:
    def __init__(self, noted: tuple[Any, ...]) -> None:
        self.weights, self.lrs, self.logged, self.state = noted


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", STRATEGIES)
def test_the_same_as_in_one_process(kind: str, way: str, ranks: list[dict[Any, Any]]) -> None:
    here, there = (_Noted(rank[kind, way]) for rank in ranks)
    assert_same_steps(here, there, rtol=0, atol=0)
    assert here.logged == there.logged
    assert here.state == there.state
    callback = GradientClipping(**WAYS[way][0], log=True)
    run, expected = fit(InOrder(SGD), "auto", accumulate_grad_batches=2, callbacks=[callback], log_every_n_steps=1)
    # Averages of two halves, in float32: a little further apart than the same sums.
    assert_same_steps(here, expected, rtol=1e-5, atol=1e-5)
    wanted = {key: float(value) for key, value in run.callback_metrics.items()}
    assert here.logged == pytest.approx(wanted, rel=1e-4)
    assert len(wanted) == 3


@pytest.mark.parametrize("way", ["max_norm", "agc"])
@pytest.mark.parametrize("kind", [kind for kind in STRATEGIES if kind != "fsdp2"])
def test_with_a_loss_scaler(kind: str, way: str, ranks: list[dict[Any, Any]]) -> None:
    here, there = (_Noted(rank[kind, way, "16"]) for rank in ranks)
    assert_same_steps(here, there, rtol=0, atol=0)
    _, expected = fit(InOrder(SGD), "auto", plugins=[scaled()], callbacks=[GradientClipping(**WAYS[way][0])])
    assert_same_steps(here, expected, rtol=1e-3, atol=1e-3)  # float16: gradients of halves are rounded by themselves


@pytest.mark.parametrize("kind", ["fsdp2", "in_graph_fsdp2"])
def test_resuming_what_is_divided(kind: str, ranks: list[dict[Any, Any]]) -> None:
    found, expected = _Noted(ranks[0][kind, "resumed"]), _Noted(ranks[0][kind, "straight"])
    expected.weights, expected.lrs = expected.weights[4:], expected.lrs[4:]
    assert_same_steps(found, expected, rtol=0, atol=0)
    assert found.state == expected.state


@pytest.mark.parametrize("where", PLACEMENTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_plain_loop_over_parts(way: str, where: str, ranks: list[dict[Any, Any]]) -> None:
    params, clipper = [nn.Parameter(tensor) for tensor in _tensors(0)], GradientClipper(**WAYS[way][0])
    for step in range(3):
        for p, gradient in zip(params, _tensors(1 + step), strict=True):
            p.grad = gradient * (1 + step)
        clipped = clipper.clip(params)
    expected: Any = ([p.grad for p in params], vars(clipped))
    for rank in ranks:
        torch.testing.assert_close(rank["in parts", way, where], expected, rtol=1e-6, atol=1e-7)
