"""Weights that share memory, or are views of what memory does not hold: perturbed by all, and put back bit for bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim.optimizers.sam import SAM

sgd = partial(lightning_optim.SGD, lr=0.1, engine="eager")


@pytest.mark.parametrize("options", [{}, {"adaptive": True}])
@pytest.mark.parametrize("second", [slice(0, 4), slice(2, 6), slice(4, 6)])
def test_overlapping_weights(second: slice, options: dict[str, Any]) -> None:
    """Each is moved by its own gradient, with the size of what was there before."""
    memory = torch.arange(1.0, 7.0)
    params = [nn.Parameter(memory[:4]), nn.Parameter(memory[second])]
    optimizer = SAM(params, sgd, rho=0.5, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    before = memory.clone()
    sizes = [before[:4] + 0.01, before[second] + 0.01] if options else [torch.ones(4), torch.ones_like(before[second])]
    for group in optimizer.param_groups:  # so that the sizes of all count
        group["param_names"] = ["a.weight", "b.weight"]
    norm = torch.cat(sizes).norm()
    expected = before.clone()
    expected[:4] += 0.5 * sizes[0] ** 2 / norm
    expected[second] += 0.5 * sizes[1] ** 2 / norm
    optimizer.perturb()
    torch.testing.assert_close(memory, expected)
    optimizer.restore()
    assert torch.equal(memory, before)


@pytest.mark.parametrize("base", [sgd, partial(torch.optim.SGD, lr=0.1, foreach=False)])
def test_a_step_of_weights_tied_through_data(base: Any) -> None:
    p = nn.Parameter(torch.ones(2))
    q = nn.Parameter(p.data)
    optimizer = SAM([p, q], base, rho=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum() / 2 + q.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.7))


def lazy(kind: str, values: Tensor) -> Tensor:
    """These values, in memory that holds other ones."""
    if kind == "neg":
        return torch._neg_view(-values)
    return values.conj().resolve_conj().conj() if kind == "conj" else values


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("of_gradient", ["neg", "conj", "plain"])
@pytest.mark.parametrize("of_weight", ["neg", "conj", "plain"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_lazily_negated_and_conjugated(of_weight: str, of_gradient: str, dtype: torch.dtype, adaptive: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values, gradient = (torch.randn(3, 2, generator=generator, dtype=dtype) for _ in range(2))
    found = []
    for weight_kind, gradient_kind in (("plain", "plain"), (of_weight, of_gradient)):
        p = nn.Parameter(lazy(weight_kind, values.clone()))
        p.grad = lazy(gradient_kind, gradient.clone())
        optimizer = SAM([p], partial(torch.optim.SGD, lr=0.1, foreach=False), rho=0.5, adaptive=adaptive)
        optimizer.perturb()
        found.append(p.detach().resolve_conj().resolve_neg().clone())
        optimizer.restore()
        assert torch.equal(p.detach().resolve_conj().resolve_neg(), values)
    assert not torch.equal(found[0], values)
    torch.testing.assert_close(found[1], found[0])


def test_names_that_are_not_those_of_the_parameters() -> None:
    """ASAM knows biases by them: one that was taken out shifts all after it."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = SAM(net.named_parameters(), sgd, adaptive=True)
    net(torch.ones(1, 2)).sum().backward()
    del optimizer.param_groups[0]["params"][0]
    with pytest.raises(RuntimeError, match=r"3 parameters and 4 param_names.*valid: a name for each, or none"):
        optimizer.perturb()
