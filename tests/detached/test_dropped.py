"""Gradients that somebody drops, changes or replaces while they are on the host, in the middle of a window."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim.offload import Detached, DetachedOptions
from lightning_optim.offload.away import Away

from .common import bits, detached, known_warnings, link, loss_of, small, weights

pytestmark = known_warnings

Params = list[nn.Parameter]


def _none(params: Params) -> None:
    for p in params:
        p.grad = None


def _some(params: Params) -> None:
    params[0].grad = params[2].grad = None


def _zeros(params: Params) -> None:
    for p in params:
        if p.grad is not None:
            p.grad.zero_()


def _times(params: Params) -> None:
    assert params[1].grad is not None
    params[1].grad *= 3
    assert params[0].grad is not None
    params[0].grad.data.mul_(0.5)
    params[2].grad = torch.ones_like(params[2])


def _clip(params: Params) -> None:
    nn.utils.clip_grad_norm_(params, 0.1)


def _look(params: Params) -> None:
    for p in params:
        if p.grad is not None:
            assert p.grad.isfinite().all()
            assert copy.deepcopy(p.grad).shape == p.shape
            assert torch.equal(pickle.loads(pickle.dumps(p.grad)), p.grad)  # noqa: S301 # our own
            assert p.grad.tolist() == p.grad.clone().tolist()
            assert str(p.grad) == str(p.grad.clone())


HOWS: dict[str, Callable[[Params], None]] = {
    "module.zero_grad": lambda params: nn.ParameterList(params).zero_grad(),
    "to zero": lambda params: nn.ParameterList(params).zero_grad(set_to_none=False),
    "None": _none,
    "some": _some,
    "zeros": _zeros,
    "changed": _times,
    "clipped": _clip,
    "looked at": _look,
}


def run(how: str, when: int, *, ours: bool, mode: str = "exact", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    params = weights(dtype)
    optimizer = lightning_optim.AdamW(params, lr=0.1)
    pipeline = Detached(optimizer, small(clip=mode), transport=link()) if ours else None
    for step in range(3):
        for micro in range(3):
            if pipeline is not None:
                pipeline.last = micro == 2
            absent = (3,) if micro == 1 else ()
            loss_of(params, step, micro, absent).backward()
            if (step, micro) == (1, when):
                HOWS[how](params)
        if pipeline is None:
            optimizer.step()
            optimizer.zero_grad()
        else:
            pipeline.step()
            pipeline.zero_grad()
    if pipeline is not None:
        pipeline.close()
    return [p.detach() for p in params]


@pytest.mark.parametrize("mode", ["exact", "speculative"])
@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("how", HOWS)
def test_what_happens_to_gradients_in_a_window_is_heeded(how: str, when: int, mode: str) -> None:
    found, expected = run(how, when, ours=True, mode=mode), run(how, when, ours=False)
    assert any(not torch.equal(a, b) for a, b in zip(expected, run("looked at", when, ours=False), strict=True)) == (
        how != "looked at"
    )
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_dropped_and_no_more_come() -> None:
    params = weights()
    with detached(lightning_optim.AdamW(params, lr=0.1, weight_decay=0.5)) as pipeline:
        pipeline.last = False
        loss_of(params, 0).backward()
        assert all(isinstance(p.grad, Away) for p in params)
        _none(params)
        before = list(map(bits, params))
        pipeline.step()
        assert all(map(torch.equal, before, map(bits, params)))
        assert not any(pipeline.optimizer.state.values())


def test_a_gradient_that_is_forgotten_says_so() -> None:
    params = weights()
    with detached(torch.optim.SGD(params, lr=0.1)) as pipeline:
        pipeline.last = False
        loss_of(params, 0).backward()
        kept = params[0].grad
        assert kept is not None
        pipeline.zero_grad()
        assert params[0].grad is None
        with pytest.raises(RuntimeError, match="this gradient was in host memory, and has been forgotten"):
            kept.sum()


def test_nothing_is_left_in_the_places_of_gradients_by_a_pipeline_that_ends() -> None:
    for ends in (Detached.close, lambda pipeline: None):
        params = weights()
        optimizer = torch.optim.SGD(params, lr=0.1)
        pipeline: Any = Detached(optimizer, small())
        pipeline.last = False
        loss_of(params, 0).backward()
        ends(pipeline)
        del pipeline
        assert all(p.grad is None for p in params)
        loss_of(params, 0).backward()
        assert all(type(p.grad) is Tensor for p in params)


def test_an_optimizer_that_steps_by_itself_sees_the_gradients() -> None:
    ends = []
    for ours in (True, False):
        params = weights(torch.float32)
        optimizer = lightning_optim.AdamW(params, lr=0.1)
        pipeline = Detached(optimizer, small()) if ours else None
        if pipeline is not None:
            pipeline.last = False
        loss_of(params, 0).backward()
        optimizer.step()
        ends.append([p.detach().clone() for p in params])
        if pipeline is not None:
            pipeline.close()
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_who_hooks_gradients_sees_them_in_their_places() -> None:
    seen: list[float] = []

    def hook(p: Tensor) -> None:
        assert p.grad is not None
        seen.append(p.grad.sum().item())
        p.grad = None

    for before in (True, False):
        params = weights(torch.float32, [(3,), (2,)])
        if before:
            params[0].register_post_accumulate_grad_hook(hook)
        start = bits(params[0])
        with detached(torch.optim.SGD(params, lr=0.1), DetachedOptions()) as pipeline:
            if not before:
                params[0].register_post_accumulate_grad_hook(hook)
            loss_of(params, 0).backward()
            pipeline.step()
        assert torch.equal(bits(params[0]), start)
        assert len(seen) == 1 + (not before)


def test_the_same_bits_as_if_nobody_had_looked() -> None:
    ends = [run(how, 0, ours=True, dtype=torch.bfloat16) for how in ("looked at", "looked at")]
    plain = partial(run, "looked at", 5, ours=True, dtype=torch.bfloat16)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ends[0], plain(), strict=True))
