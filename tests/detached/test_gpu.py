"""Detached steps of weights on a GPU: ``pytest -m gpu tests/detached``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lightning_optim.engines.scaling import LossScale
from lightning_optim.offload import Detached
from lightning_optim.offload.cuda import CudaTransport

from .common import PAIRS, UNDOABLE, Plan, detached, loss_of, reference, small, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

MANY: list[tuple[int, ...]] = [(512, 1024), (1024,), (64, 32, 3, 3), (2048, 512), ()]


def on_gpu(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().cuda()) for p in weights(dtype, MANY)]


@pytest.fixture
def busy() -> Iterator[None]:
    """Work that the device is late with, so that what does not wait for it reads what was there before."""
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        x = torch.tanh(x @ x)
    yield
    torch.cuda.synchronize()


@pytest.mark.parametrize("mode", ["exact", "speculative"])
@pytest.mark.parametrize("fraction", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["torch AdamW", "sgd, dampening", "lamb"])
def test_steps_are_those_of_host_memory(name: str, dtype: torch.dtype, fraction: float, mode: str) -> None:
    """The same slopes, from the host: `loss_of` makes them there, of the weights' values."""
    assert name in UNDOABLE
    norm = 3500.0  # between the norms of steps, which are about 1300, 2600 and 3900
    ours, theirs = PAIRS[name]
    params, host = on_gpu(dtype), weights(dtype, MANY)
    optimizer = ours(params)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    norms = []
    with detached(optimizer, small(bucket_mb=0.5, clip=mode, device_fraction=fraction)) as pipeline:
        pipeline.expects = (8.0, norm)
        for step in range(6):
            loss = loss_of([p.cpu() for p in params], step) * 8.0
            loss.backward()
            found = torch.zeros((), device="cuda")
            pipeline.step(max_grad_norm=norm, loss=LossScale(torch.tensor(8.0, device="cuda"), found))
            assert found.item() == 0
            assert pipeline.scaling is not None
            norms.append((pipeline.scaling.norm() or found).item())
            pipeline.zero_grad()
            schedule.step()
        masters = [pipeline.masters()[p].detach().cpu() for p in params]
    assert 0 < sum(value > norm for value in norms) < 6
    expected = reference(host, theirs, Plan(scale=8.0, clip=norm))
    for p, master, other in zip(params, masters, expected.masters, strict=True):
        torch.testing.assert_close(master, other, rtol=1e-5, atol=1e-5)  # the device adds squares in another order
        assert torch.equal(p.detach().cpu(), master.to(dtype))


def test_copies_wait_for_the_stream_that_makes_the_gradients(busy: None) -> None:
    """On another stream than the current one, behind work that takes a while; then freed at once, and overwritten."""
    transport = CudaTransport(torch.device("cuda", torch.cuda.current_device()))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    target = torch.zeros(1 << 22).pin_memory()
    with torch.cuda.stream(stream):
        x = torch.randn(4096, 4096, device="cuda")
        for _ in range(10):
            x = torch.tanh(x @ x)
        gradient = torch.full((1 << 22,), 3.0, device="cuda") + 0 * x.flatten()[0]
        ticket = transport.fetch([gradient], [target], "one")
        del gradient
        torch.full((1 << 22,), 7.0, device="cuda")  # in the same memory, if the allocator gave it away
    ticket.wait()
    assert (target == 3).all()


def test_weights_are_not_overwritten_while_they_are_used(busy: None) -> None:
    transport = CudaTransport(torch.device("cuda", torch.cuda.current_device()))
    weight = torch.ones(1 << 22, device="cuda")
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        x = torch.tanh(x @ x)
    used = weight + 0 * x.flatten()[0]
    new = torch.full((1 << 22,), 5.0).pin_memory()
    transport.send([new], [weight], "one", transport.fence()).wait_on_device()
    after = weight.clone()
    assert (used == 1).all()
    assert (after == 5).all()


@pytest.mark.parametrize("order", ["transposed", "channels_last", "negated"])
def test_gradients_in_another_order_arrive_whole(order: str, busy: None) -> None:
    """Torch would reorder them on the host before they are there."""
    transport = CudaTransport(torch.device("cuda", torch.cuda.current_device()))
    source = torch.randn(64, 128, 32, 32, device="cuda")
    target = torch.zeros(64, 128, 32, 32).pin_memory()
    if order == "transposed":
        target = target.permute(3, 2, 1, 0).contiguous().pin_memory().permute(3, 2, 1, 0)
    elif order == "channels_last":
        target = target.to(memory_format=torch.channels_last).pin_memory()
    else:
        source = torch._neg_view(source)
    for _ in range(3):
        target.fill_(float("nan"))
        transport.fetch([source], [target], "one").wait()
        assert torch.equal(target, source.cpu())


def test_what_travels_is_pinned() -> None:
    with detached(torch.optim.AdamW(on_gpu(torch.float32), lr=0.1)) as pipeline:
        for bucket in pipeline.buckets:
            assert all(t.is_pinned() for t in (*bucket.staging, *bucket.ships()) if t.numel())


def test_gradients_are_freed_in_the_backward_pass() -> None:
    params = on_gpu()
    with detached(torch.optim.AdamW(params, lr=0.1), small(bucket_mb=0.1)) as pipeline:
        for step in range(2):
            loss_of([p.cpu() for p in params], step).backward()
            assert all(p.grad is None for p in params)
            pipeline.step()
            pipeline.zero_grad()


def test_a_step_on_a_stream_of_ones_own() -> None:
    ends = []
    for stream in (None, torch.cuda.Stream()):
        params = on_gpu()
        with torch.cuda.stream(stream), detached(torch.optim.AdamW(params, lr=0.1), small(bucket_mb=0.5)) as pipeline:
            for step in range(4):
                loss_of([p.cpu() for p in params], step).backward()
                pipeline.step(max_grad_norm=1000.0)
                pipeline.zero_grad()
            ends.append([p.detach().clone() for p in params])
        torch.cuda.synchronize()
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_weights_on_two_kinds_of_device_are_refused() -> None:
    with pytest.raises(ValueError, match="weights on cpu, cuda:0; valid: one device"):
        Detached(torch.optim.SGD([*on_gpu(), *weights()], lr=0.1))
