"""Weights and gradients in any memory order: the values count, not how they lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from .common import each, each_engine, give_gradients, known_warnings, make, parameters, train

pytestmark = known_warnings


@each
@each_engine
def test_memory_format_changed_after_steps(name: str, engine: str) -> None:
    params, expected = (parameters(shapes=[(2, 3, 4, 5)]) for _ in range(2))
    optimizer, reference = make(name, params, engine=engine), make(name, expected, engine=engine)
    train(optimizer, range(2))
    train(reference, range(2))
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    train(optimizer, range(2, 4))
    train(reference, range(2, 4))
    # Norms are summed in memory order.
    torch.testing.assert_close(params[0].data, expected[0].data, rtol=1e-6, atol=1e-7)


@each
@each_engine
@pytest.mark.filterwarnings("ignore:.*weights have gaps:lightning_optim.warnings.LightningOptimWarning")
def test_non_contiguous_weights_and_gradients(name: str, engine: str) -> None:
    """Transposed, sliced with gaps, expanded gradients: the values count, not how they lie in memory."""
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(base.clone().t()), nn.Parameter(base.clone()[:, ::2]), nn.Parameter(base.clone())]
    expected = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    optimizer, reference = make(name, params, engine=engine), make(name, expected, engine=engine)
    for step in range(3):
        give_gradients(expected, step)
        grads: list[Any] = [q.grad for q in expected]
        grads[2] = expected[2].grad = torch.full((1, 1), 0.1 + step).expand(6, 8)
        params[0].grad = grads[0].clone() if step % 2 else grads[0].t().contiguous().t()
        params[1].grad = grads[1].repeat_interleave(2, dim=1)[:, ::2]
        params[2].grad = grads[2]
        expected[2].grad = grads[2].contiguous()
        optimizer.step()
        reference.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.data, q.data, rtol=1e-6, atol=1e-7)  # norms are summed in memory order
