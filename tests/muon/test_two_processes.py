"""Weights divided over two processes in other ways than FSDP2's, which the conformance tests have."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from ranks import RANKS, enter, launch, leave
from torch import nn

from .common import muon, normal, train, weights

SHAPES = ((5, 7), (7, 5), (3, 4, 5), (4, 3, 3, 3), (3, 4), (1, 4))


def rank_main(rank: int, folder: Path) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    enter(rank, folder)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    places = [Shard(1), Shard(0), Shard(0), Shard(1), Replicate(), Shard(0)]
    whole = weights(SHAPES)
    params = [
        nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [place]))
        for p, place in zip(whole, places, strict=True)
    ]
    expected, optimizer = muon(whole, max_grad_norm=0.5), muon(params, max_grad_norm=0.5)
    assert "eager" not in optimizer.engine_report()
    for step in range(3):
        train(expected, whole, [step])
        for index, (p, place) in enumerate(zip(params, places, strict=True)):
            p.grad = distribute_tensor(normal(p.shape, 100 + index, step), mesh, [place])
        optimizer.step()
    for p, q in zip(params, whole, strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-11, atol=1e-12)  # type: ignore[attr-defined]
    assert optimizer.grad_norm is not None
    assert expected.grad_norm is not None
    torch.testing.assert_close(optimizer.grad_norm, expected.grad_norm, rtol=1e-12, atol=0)
    leave()


def test_weights_divided_over_processes_are_stepped_as_whole_matrices(tmp_path: Path) -> None:
    launch(rank_main, tmp_path)
