"""Weights and gradients that are lazily negated or conjugated: memory holds other numbers than they have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import LBFGS


def lazy(kind: str, values: Tensor) -> Tensor:
    if kind == "neg":
        return torch._neg_view(-values)
    if kind == "conj":
        return values.conj().resolve_conj().conj()
    if kind == "imag":  # of a conjugate: negated, and with gaps
        return torch.complex(torch.zeros_like(values), -values).conj().imag
    return values


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("neg", torch.float32),
        ("imag", torch.float32),
        ("neg", torch.complex64),
        ("conj", torch.complex64),
        ("conj", torch.complex128),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"line_search": "armijo", "weight_decay": 0.1}, {"line_search": None, "lr": 0.1}]
)
def test_steps_are_those_of_plain_tensors(options: dict[str, Any], dtype: torch.dtype, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 2, generator=generator, dtype=dtype)
    found = []
    for weight, gradient in (("", ""), (kind, ""), ("", kind), (kind, kind)):
        p = nn.Parameter(lazy(weight, start.clone()))
        other = nn.Parameter(torch.ones(2))
        optimizer = LBFGS([other, p], **options)

        def closure(optimizer: Any = optimizer, p: Any = p, other: Any = other, kind: str = gradient) -> Tensor:
            optimizer.zero_grad()
            loss = (p.abs() - 1.5).square().sum() + (other * other).sum() * p.abs().sum()
            loss.backward()
            p.grad = lazy(kind, p.grad)
            return loss

        before = closure().item()
        for _ in range(4):
            optimizer.step(closure)
        assert closure().item() < before
        found.append(p.detach().resolve_conj().resolve_neg())
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-4, atol=1e-4)
