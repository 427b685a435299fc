"""Muon on a GPU: ``pytest -m gpu tests/muon``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_optim.engines.scaling import LossScale

from .common import give_gradients, muon, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

SHAPES = [(256, 128), (128, 256), (256, 128), (8, 4, 3, 3), (3, 64, 96)]


def pair() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    exact = weights(SHAPES)
    return [nn.Parameter(p.detach().to("cuda", torch.float32)) for p in exact], exact


def test_bfloat16_products_stay_close_to_float64() -> None:
    ours, exact = pair()
    optimizer, reference = muon(ours, max_grad_norm=1.0), muon(exact, max_grad_norm=1.0)
    start = [p.detach().clone() for p in exact]
    for step in range(5):
        give_gradients(exact, step)
        for p, q in zip(ours, exact, strict=True):
            assert q.grad is not None
            p.grad = q.grad.to("cuda", torch.float32)
        optimizer.step()
        reference.step()
    for p, q, before in zip(ours, exact, start, strict=True):
        # bfloat16 has 8 bits, and five steps with slopes of up to 3.4 lose a few.
        assert (p.cpu() - q).norm() < 0.05 * (q - before).norm()


def test_a_step_never_waits() -> None:
    ours, exact = pair()
    optimizer = muon(ours)
    scale, found = torch.tensor(8.0, device="cuda"), torch.zeros((), device="cuda")
    for step in range(4):
        give_gradients(exact, step)
        for p, q in zip(ours, exact, strict=True):
            assert q.grad is not None
            p.grad = q.grad.to("cuda", torch.float32)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.no_grad():
                optimizer._stepper.step(loss=LossScale(scale, found), max_grad_norm=1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
