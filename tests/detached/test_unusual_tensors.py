"""Weights and gradients that are not what they seem, or are nothing, and a world around that is not the usual one."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from foreign import Foreign
from torch import Tensor, nn

import lightning_optim
from lightning_optim.offload import Detached, DetachedOptions

from .common import bits, detached, known_warnings, loss_of, small, weights

pytestmark = known_warnings


def _plain(dtype: torch.dtype) -> Tensor:
    made = torch.arange(1, 13).reshape(3, 4).to(dtype)
    return made * (1 + 0.5j) if dtype.is_complex else made


def _as(kind: str, value: Tensor) -> Tensor:
    """A tensor of this value that lies in memory in another way."""
    if kind == "negated":
        return torch._neg_view(-value)
    if kind == "conjugated":
        return value.conj().resolve_conj().conj()
    if kind == "gaps":
        wide = torch.zeros(3, 8, dtype=value.dtype)
        wide[:, ::2] = value
        return wide[:, ::2]
    if kind == "transposed":
        return value.t().contiguous().t()
    return value.clone()


KINDS = ["negated", "conjugated", "gaps", "transposed"]


def _run(weight: str, gradient: str, dtype: torch.dtype, fraction: float | None, make: Any) -> Tensor:
    value = _plain(dtype)
    lies = _as(weight, value)
    p = nn.Parameter(torch.empty_like(value))
    p.data = lies
    other = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = make([p, other])
    options = DetachedOptions(bucket_mb=1e-5, device_fraction=fraction or 0.0)
    pipeline = None if fraction is None else Detached(optimizer, options)
    for step in range(3):
        p.grad = _as(gradient, value * (step + 1))
        other.grad = torch.ones(4, dtype=dtype)
        if pipeline is None:
            optimizer.step()
        else:
            pipeline.step(max_grad_norm=1e6)
            pipeline.zero_grad()
    if pipeline is not None:
        pipeline.close()
    return p.detach().resolve_conj().resolve_neg().clone()


@pytest.mark.parametrize("fraction", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("kind", KINDS)
def test_views_of_weights_and_gradients_are_right_or_refused(kind: str, dtype: torch.dtype, fraction: float) -> None:
    if kind == "conjugated" and not dtype.is_complex:
        pytest.skip("of complex tensors only")
    for make in (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), lambda ps: lightning_optim.AdamW(ps, lr=0.1)):
        for weight, gradient in ((kind, "plain"), ("plain", kind), (kind, kind)):
            expected = _run("plain", "plain", dtype, fraction, make)
            try:
                found = _run(weight, gradient, dtype, fraction, make)
            except ValueError as refused:  # when the optimizer is taken over
                if weight not in ("negated", "conjugated") or "lazily" not in str(refused):
                    raise
                continue
            assert torch.equal(found, expected), (weight, gradient)


@pytest.mark.parametrize("make", [Foreign, torch.optim.AdamW, lightning_optim.AdamW])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shapes", [[(3, 0)], [(0,), (2,)], [(0,), (0, 2)], [(1,)], [()], [(0,), (), (5,), (0,)]])
def test_parameters_without_elements(shapes: Any, fraction: float, make: Any) -> None:
    if fraction and make is Foreign:
        pytest.skip("refused")
    for dtypes in ([torch.float32], [torch.float16, torch.float32, torch.float64]):
        params = [nn.Parameter(torch.ones(shape, dtype=dtypes[i % len(dtypes)])) for i, shape in enumerate(shapes)]
        twins = [nn.Parameter(torch.ones(p.shape)) for p in params]
        other = make(twins, lr=0.1)
        with detached(make(params, lr=0.1), DetachedOptions(device_fraction=fraction)) as pipeline:
            for step in range(3):
                for ps in (params, twins):
                    torch.stack([(step + 1) * p.float().sum() for p in ps]).sum().backward()
                pipeline.step(max_grad_norm=1e6)
                pipeline.zero_grad()
                other.step()
                other.zero_grad()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p.float(), q, rtol=2e-3, atol=2e-3)


def _meta() -> AbstractContextManager[Any]:
    return torch.device("meta")


WORLDS: dict[str, Any] = {
    "default device": _meta,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("mode", [{}, {"clip": "speculative"}, {"device_fraction": 0.5}, {"delay_one_step": True}])
@pytest.mark.parametrize("world", WORLDS)
def test_the_world_around_changes_nothing(world: str, mode: dict[str, Any]) -> None:
    ends = []
    for around in (WORLDS[world], nullcontext):
        params = weights()
        with around():
            optimizer = lightning_optim.AdamW(params, lr=0.1)
            pipeline = Detached(optimizer, small(**mode))
        for step in range(3):
            loss_of(params, step).backward()
            with around():
                pipeline.step(max_grad_norm=1.0)
                pipeline.zero_grad()
        with around():
            pipeline.publish()
            masters = pipeline.masters()
        pipeline.close()
        ends.append([bits(v) for p in params for v in (p, masters[p])])
    assert all(map(torch.equal, *ends))


def test_another_default_type_changes_nothing() -> None:
    ends = []
    for default in (torch.float64, torch.float32):
        params = weights()
        torch.set_default_dtype(default)
        try:
            optimizer = lightning_optim.AdamW(params, lr=0.1)
            with detached(optimizer, small(clip="speculative")) as pipeline:
                for step in range(3):
                    loss_of(params, step).backward()
                    pipeline.step(max_grad_norm=1.0)
                    pipeline.zero_grad()
                ends.append(list(map(bits, pipeline.masters().values())))
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, *ends))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_makes_its_own_thread_or_says_why_not() -> None:
    params = weights()
    torch.set_num_threads(1)  # a forked process has none of OpenMP's
    optimizer = lightning_optim.AdamW(params, lr=0.1)
    with detached(optimizer, small(delay_one_step=True)) as pipeline:
        loss_of(params, 0).backward()
        pipeline.step()
        pipeline.publish()
        pipeline.zero_grad()
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                for p in params:
                    p.grad = torch.ones_like(p)
                before = bits(params[0])
                pipeline.step()
                pipeline.publish()
                os.write(write, b"stepped" if not torch.equal(bits(params[0]), before) else b"nothing")
            except BaseException as error:
                os.write(write, repr(error).encode()[:500])
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 500) == b"stepped"
        loss_of(params, 1).backward()
        pipeline.step()
        os.close(read)
        os.close(write)
