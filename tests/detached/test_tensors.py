"""Weights and gradients of every form: each trap by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_optim.offload import Detached
from lightning_optim.offload.shared_memory import check_memory

from .common import (
    PAIRS,
    UNDOABLE,
    Plan,
    assert_close_to,
    back_and_step,
    detached,
    known_warnings,
    reference,
    run,
    small,
    weights,
)

pytestmark = known_warnings


def forms(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "transposed": lambda w: w.t(),
        "channels_last": lambda w: w.reshape(3, 4, 5, 2).contiguous(memory_format=torch.channels_last),
        "with gaps": lambda w: w[:, ::2],
        "one dimension of 1": lambda w: w[:, :1].t(),
        "0 elements": lambda w: w[:0],
        "0-dim": lambda w: w[0, 0],
    }


def strange(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    made = [form(torch.randn(12, 10, generator=generator).to(dtype)) for form in forms(dtype).values()]
    return [nn.Parameter(p) for p in made]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["torch AdamW", "lamb", "foreign"])
@pytest.mark.parametrize("overlap", [True, False])
def test_non_contiguous_and_channels_last_weights_are_updated(name: str, dtype: torch.dtype, overlap: bool) -> None:
    ours, theirs = PAIRS[name]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for mode in ["exact", "speculative"] if name in UNDOABLE else ["exact"]:
        params = strange(dtype)
        strides = [p.stride() for p in params]
        plan = Plan(clip=20.0)
        found = run(params, ours, plan, small(clip=mode), overlap=overlap)
        assert_close_to(found, reference(strange(dtype), theirs, plan, wide), 2e-6)
        assert [p.stride() for p in params] == strides


@pytest.mark.parametrize("mode", ["exact", "speculative"])
def test_gradients_in_another_order_in_memory(mode: str) -> None:
    """A kernel that went through both as they lie would give each weight another's gradient."""
    p, q = (nn.Parameter(torch.arange(12.0).reshape(3, 4)) for _ in range(2))
    stock = torch.optim.AdamW([q], lr=0.1)
    g = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).t()
    with detached(torch.optim.AdamW([p], lr=0.1), small(clip=mode), overlap=False) as pipeline:
        for step in range(3):
            p.grad, q.grad = g * (step + 1), g * (step + 1)
            assert p.grad.stride() != p.stride()
            pipeline.step()
            stock.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "torch AdamW", "torch SGD", "foreign Adagrad"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_weights(name: str, dtype: torch.dtype) -> None:
    def complex_weights() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(2)
        return [nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in ((3, 4), (5,))]

    ours, theirs = PAIRS[name]
    wide = torch.float64 if dtype == torch.complex128 else torch.float32
    for mode in ["exact", "speculative"] if name in UNDOABLE else ["exact"]:
        found = run(complex_weights(), ours, Plan(clip=6.0), small(clip=mode))
        assert 0 < sum(norm > 6.0 for norm in found.norms) < 6
        assert_close_to(found, reference(complex_weights(), theirs, Plan(clip=6.0), wide), 2e-6)


def test_weights_of_several_types_in_one_optimizer() -> None:
    def mixed() -> list[nn.Parameter]:
        types = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
        return [nn.Parameter(p.detach().to(dtype)) for p, dtype in zip(weights(torch.float32), types, strict=True)]

    ours, theirs = PAIRS["torch AdamW"]
    found = run(mixed(), ours, Plan(clip=20.0), small(bucket_mb=1.0))
    assert_close_to(found, reference(mixed(), theirs, Plan(clip=20.0)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.out.weight = self.into.weight

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.tanh(self.into(x)))


@pytest.mark.parametrize("mode", ["exact", "speculative", "none"])
def test_tied_weights_are_one_parameter(mode: str) -> None:
    net, twin = Tied(), Tied()
    stock = torch.optim.AdamW(twin.parameters(), lr=0.05)
    with detached(torch.optim.AdamW(net.parameters(), lr=0.05), small(clip=mode)) as pipeline:
        for _ in range(4):
            for module in (net, twin):
                module(torch.arange(8)).square().sum().backward()
            pipeline.step()
            pipeline.zero_grad()
            stock.step()
            stock.zero_grad()
    torch.testing.assert_close(net.into.weight, twin.into.weight, rtol=1e-5, atol=1e-6)
    assert net.out.weight is net.into.weight


def test_tied_weights_through_data_are_refused() -> None:
    """Both would be sent to one place, and the last would win."""
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight.data = a.weight.data
    optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"weights of shapes \(3, 3\) and \(3, 3\) share memory.*the same Parameter"):
        Detached(optimizer)
    part = nn.Parameter(a.weight.data[1:])
    with pytest.raises(ValueError, match="share memory"):
        Detached(torch.optim.SGD([a.weight, part], lr=0.1))
    a.weight.requires_grad_(False)
    Detached(optimizer).close()  # of one that is not stepped nothing is lost


def test_what_shares_memory() -> None:
    whole = torch.randn(6, 4)
    columns = [whole[:, 0], whole[:, 1], whole[:, 2:]]  # between each other, and apart
    check_memory(columns)
    check_memory([torch.zeros(0), torch.zeros(0), whole])
    numbers = np.zeros(8)  # one piece of memory, of which torch makes two storages
    parts = [torch.from_numpy(part) for part in (numbers[:5], numbers[3:])]
    refused = [
        [*columns, whole[2:3, 1:2]],
        [torch.zeros(1).expand(3)],
        [torch.zeros(4).as_strided((3, 2), (1, 1))],
        [whole, whole.view(torch.int32)],
        parts,
    ]
    for tensors in refused:
        with pytest.raises(ValueError, match="share memory"):
            check_memory(tensors)


@pytest.mark.parametrize("overlap", [True, False])
def test_gradient_dtype_is_checked(overlap: bool) -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    p.grad_dtype = None  # any
    with detached(torch.optim.SGD([p], lr=0.1), overlap=overlap) as pipeline:
        p.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match=r"of torch.bfloat16 and shape \(3,\) has a gradient of torch.float32"):
            pipeline.step()
        assert p.tolist() == [1, 1, 1]
        pipeline.zero_grad()
        p.grad = torch.ones(3, dtype=torch.bfloat16)
        pipeline.step()
        assert p[0].item() == pytest.approx(0.9, abs=4e-3)


def test_sparse_gradients_are_refused() -> None:
    net = nn.Embedding(4, 2, sparse=True)
    with detached(torch.optim.SGD(net.parameters(), lr=0.1)) as pipeline:
        with pytest.raises(RuntimeError, match=r"gradient of layout torch.sparse_coo; valid: dense gradients"):
            back_and_step(pipeline, net(torch.tensor([1])).sum())
        pipeline.zero_grad()
        assert net.weight.grad is None
        pipeline.step()


def test_gradients_that_are_lazily_negated_or_conjugated() -> None:
    p = nn.Parameter(torch.tensor([1 + 1j, 2 - 1j]))
    with detached(torch.optim.SGD([p], lr=1.0), overlap=False) as pipeline:
        p.grad = torch.tensor([1 + 2j, 3 + 4j]).conj()
        assert p.grad.is_conj()
        pipeline.step()
    assert p.tolist() == [0 + 3j, -1 + 3j]


def test_weights_on_a_device_without_a_way_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights on meta: .*valid: cpu, cuda"):
        Detached(torch.optim.SGD([nn.Parameter(torch.zeros(2, device="meta"))], lr=0.1))


def test_memory_is_the_hosts_whatever_the_default_device() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=0.5)
    with torch.device("meta"), detached(optimizer) as pipeline:
        p.grad = torch.ones_like(p)
        pipeline.step(max_grad_norm=100.0)
        assert pipeline.masters()[p].tolist() == p.tolist() == [0.5, 0.5, 0.5]
