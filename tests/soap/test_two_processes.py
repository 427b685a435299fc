"""Weights divided over two processes are stepped as whole tensors; what is kept for them is divided where it can be."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from ranks import RANKS, enter, launch, leave
from torch import nn

from lightning_optim import SOAP

from .common import give_gradients, normal, weights

SHAPES = ((3, 4), (4, 3), (4, 4), (3, 2, 4), (3, 4), (5,))


def rank_main(rank: int, folder: Path) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    enter(rank, folder)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    places = [Shard(1), Shard(0), Shard(0), Shard(2), Replicate(), Shard(0)]
    whole = weights(SHAPES)
    params = [
        nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [place]))
        for p, place in zip(whole, places, strict=True)
    ]
    expected, optimizer = (SOAP(ps, max_grad_norm=0.5, precondition_frequency=2) for ps in (whole, params))
    for step in range(5):
        give_gradients(whole, step)
        expected.step()
        for index, (p, place) in enumerate(zip(params, places, strict=True)):
            p.grad = distribute_tensor(normal(p.shape, 100 + index, step), mesh, [place])
        optimizer.step()
        if step == 0:  # of equal eigenvalues any basis will do
            for p, q in zip(params, whole, strict=True):
                for name in [name for name in expected.state[q] if name.startswith("q_")]:
                    found = optimizer.state[p][name]
                    expected.state[q][name].copy_(found.full_tensor() if hasattr(found, "full_tensor") else found)
    for p, q in zip(params, whole, strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-9, atol=1e-10)  # type: ignore[attr-defined]
    assert optimizer.grad_norm is not None
    assert expected.grad_norm is not None
    torch.testing.assert_close(optimizer.grad_norm, expected.grad_norm, rtol=1e-12, atol=0)
    leave()


def test_weights_divided_over_processes_are_stepped_as_whole_tensors(tmp_path: Path) -> None:
    launch(rank_main, tmp_path)
