"""Host memory: few slabs, pinned where it can be, and freed."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim.offload import Detached
from lightning_optim.offload.arena import ALIGNMENT, Slab
from lightning_optim.offload.buckets import OffloadBucket, Place, lay_out
from lightning_optim.warnings import LightningOptimWarning

from .common import PAIRS, detached, known_warnings, link, loss_of, small, weights

pytestmark = known_warnings


class FakeRuntime:
    """Of CUDA: registers host memory, or fails to."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802 # CUDA's name
        assert flags == 0
        if not self.code:
            self.registered[address] = size
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 # CUDA's name
        del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr("lightning_optim.warnings._seen", set())
    return fake


def test_pinned_slabs_are_not_rounded_to_powers_of_two(runtime: FakeRuntime) -> None:
    like = [torch.zeros(1025), torch.zeros(3, 5).t(), torch.zeros(0), torch.zeros(())]
    slab = Slab(torch.bfloat16, like, pinned=True)
    assert slab.pinned
    ((address, size),) = runtime.registered.items()
    assert address == slab.memory.data_ptr()
    assert 2 * (1025 + 15 + 1) <= size == slab.memory.nbytes <= 2 * (1025 + 15 + 1) + 3 * ALIGNMENT
    for tensor, other in zip(slab.tensors, like, strict=True):
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (other.shape, other.stride(), torch.bfloat16)
        assert (tensor.data_ptr() - address) % ALIGNMENT == 0 or not tensor.numel()


def test_a_slab_is_unpinned_when_the_last_of_it_is_freed(runtime: FakeRuntime) -> None:
    """Masters are new tensors over the same memory: they outlive the slab and its views."""
    slab = Slab(torch.float32, [torch.zeros(4), torch.zeros(4)], pinned=True)
    master = nn.Parameter(slab.tensors[1], requires_grad=False)
    del slab
    gc.collect()
    assert len(runtime.registered) == 1
    del master
    gc.collect()
    assert not runtime.registered


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_travels_is_pinned_in_one_slab_of_each_kind(runtime: FakeRuntime, dtype: torch.dtype) -> None:
    buckets = [OffloadBucket(str(n), [Place(p, 0, n, n)]) for n, p in enumerate(weights(dtype))]
    lay_out(buckets, torch.float32, pinned=True)
    gc.collect()
    assert len(runtime.registered) == 2  # gradients, and the weights that leave: masters, if of the same type
    spans = [range(address, address + size) for address, size in runtime.registered.items()]
    for bucket in buckets:
        for tensor in (*bucket.staging, *bucket.ships()):
            assert any(tensor.data_ptr() in span for span in spans) or not tensor.numel()
    before = len(runtime.registered)
    del buckets, bucket, tensor
    gc.collect()
    assert (before, len(runtime.registered)) == (2, 0)


def test_memory_that_cannot_be_pinned_stays_pageable_with_one_warning(runtime: FakeRuntime) -> None:
    runtime.code = 2
    with pytest.warns(LightningOptimWarning, match=r"0.0 GB of host memory could not be pinned \(CUDA error 2\)"):
        slab = Slab(torch.float32, [torch.zeros(4)], pinned=True)
    assert not slab.pinned
    assert slab.tensors[0].tolist() == [0, 0, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Slab(torch.float32, [torch.zeros(4)], pinned=True)
        assert not Slab(torch.float32, [], pinned=True).pinned  # there is nothing to pin


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("lightning-optim")}


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("mode", ["exact", "speculative"])
@pytest.mark.parametrize("name", ["torch AdamW", "adamw, amsgrad", "foreign"])
def test_a_pipeline_that_is_dropped_frees_masters_thread_and_hooks(name: str, mode: str, close: bool) -> None:
    if mode == "speculative" and name == "foreign":
        pytest.skip("refused")
    params, before = weights(), threads()
    optimizer = PAIRS[name][0](params)
    pipeline = Detached(optimizer, small(clip=mode))
    for step in range(3):
        loss_of(params, step).backward()
        pipeline.step(max_grad_norm=10.0)
        pipeline.zero_grad()
    loss_of(params, 4).backward()
    masters = [weakref.ref(master) for master in pipeline.masters().values()]
    staging = [weakref.ref(t.untyped_storage()) for bucket in pipeline.buckets for t in bucket.staging]
    (thread,) = threads() - before
    assert all(p._post_accumulate_grad_hooks for p in params)
    if close:
        pipeline.close()
        pipeline.close()
    del pipeline
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    assert all(master() is None for master in masters)
    assert all(memory() is None for memory in staging)
    assert not any(p._post_accumulate_grad_hooks for p in params)
    state: Any = optimizer.state[params[0]]
    assert state
    gone = weakref.ref(optimizer)
    del optimizer, state
    gc.collect()
    assert gone() is None


def test_the_optimizer_is_not_kept_alive() -> None:
    params = weights()
    optimizer = PAIRS["torch AdamW"][0](params)
    pipeline, gone = Detached(optimizer), weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="the optimizer no longer exists"):
        pipeline.step()
    pipeline.close()


def test_gradients_are_freed_as_they_arrive_and_the_link_keeps_none() -> None:
    params, transport = weights(), link()
    with detached(PAIRS["torch SGD"][0](params), transport=transport) as pipeline:
        seen: list[weakref.ref[torch.Tensor]] = []
        for p in params:
            p.register_hook(lambda g: seen.append(weakref.ref(g)))
        loss_of(params, 0).backward()
        assert all(p.grad is None for p in params)
        pipeline.step()
        pipeline.zero_grad()
        gc.collect()
        assert len(seen) == len(params)
        assert not [ref for ref in seen if ref() is not None]
