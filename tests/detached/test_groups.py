"""Param groups and parameters that come, go and change places while masters are in host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign import Foreign
from torch import Tensor, nn
from torch.optim import Optimizer

import lightning_optim
from lightning_optim.offload import Detached, DetachedOptions

from .common import bits, detached, known_warnings, loss_of, small, weights

pytestmark = known_warnings

Change = Callable[[Optimizer, list[nn.Parameter]], None]


def _groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "lr": 0.1}, {"params": params[2:4], "lr": 0.01}, {"params": params[4:5], "lr": 1.0}]


def _reverse(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups.reverse()
    for group in optimizer.param_groups:
        group["params"].reverse()


def _take_out(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"] = params[1:2]


def _remove(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    del optimizer.param_groups[0]


def _move(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[2]["params"].append(optimizer.param_groups[0]["params"].pop(0))


def _add(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.add_param_group({"params": params[5:], "lr": 0.5})


def _exchange(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    _remove(optimizer, params)
    _add(optimizer, params)


def _unfreeze(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    params[4].requires_grad = True


CHANGES: dict[str, Change] = {
    "reverse": _reverse,
    "take out": _take_out,
    "remove": _remove,
    "move": _move,
    "add": _add,
    "exchange": _exchange,
    "unfreeze": _unfreeze,
}
SHAPES = [(3, 2), (4,), (2, 2), (), (5,), (3,)]


def run(change: str, when: str, options: DetachedOptions | None, make: Any = lightning_optim.AdamW) -> list[Tensor]:
    params = weights(torch.float32, SHAPES)
    if change == "unfreeze":
        params[4].requires_grad = False
    optimizer = make(_groups(params), lr=0.1)
    pipeline = None if options is None else Detached(optimizer, options)
    for step in range(5):
        if step == 2 and when == "before":
            CHANGES[change](optimizer, params)
        for micro in range(2):
            if pipeline is not None:
                pipeline.last = micro == 1
            loss_of(params, step, micro).backward()
            if (step, micro, when) == (2, 0, "between"):
                CHANGES[change](optimizer, params)
        if step == 2 and when == "after":
            CHANGES[change](optimizer, params)
        if pipeline is None:
            optimizer.step()
        else:
            pipeline.step(max_grad_norm=1e6)
            pipeline.zero_grad()
        for p in params:
            p.grad = None
    if pipeline is not None:
        pipeline.close()
    return [p.detach() for p in params]


@pytest.mark.parametrize("mode", ["exact", "speculative", "beside"])
@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_masters_follow_their_parameters(change: str, when: str, mode: str) -> None:
    options = {"device_fraction": 0.5} if mode == "beside" else {"clip": mode}
    found, expected = run(change, when, small(bucket_mb=3e-5, **options)), run(change, when, None)
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_an_optimizer_that_runs_its_own_step_follows_too() -> None:
    for change in CHANGES:
        found = run(change, "before", small(bucket_mb=3e-5), Foreign)
        for p, q in zip(found, run(change, "before", None, Foreign), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_masters_of_parameters_that_moved_keep_their_bits() -> None:
    params = weights(torch.bfloat16, SHAPES)
    optimizer = lightning_optim.SGD(_groups(params), lr=0.1, momentum=0.9)
    with detached(optimizer, small(bucket_mb=2e-5)) as pipeline:
        loss_of(params, 0).backward()
        pipeline.step()
        pipeline.zero_grad()
        before = {p: bits(master) for p, master in pipeline.masters().items()}
        optimizer.param_groups.reverse()
        _take_out(optimizer, params[2:])
        masters = pipeline.masters()
        assert len(masters) == len(before) - 1
        assert all(torch.equal(bits(master), before[p]) for p, master in masters.items())


def test_masters_of_what_is_still_frozen_are_kept_until_it_is_not() -> None:
    params = weights(torch.bfloat16, [(3,), (4,)])
    params[1].requires_grad = False
    finer = params[1].detach().float() * (1 + 1e-4)
    with detached(torch.optim.SGD(params, lr=0.1)) as pipeline:
        assert pipeline.set_masters({params[1]: finer}) == []
        assert params[1] not in pipeline.masters()
        params[1].requires_grad = True
        assert torch.equal(pipeline.masters()[params[1]], finer)


def test_who_takes_a_parameter_over_finds_its_gradient() -> None:
    params = weights(torch.float32, [(3,), (4,)])
    optimizer = torch.optim.SGD(params, lr=0.1)
    with detached(optimizer, DetachedOptions()) as pipeline:
        pipeline.last = False
        loss_of(params, 0).backward()
        expected = params[0].grad.clone()  # type: ignore[union-attr]
        optimizer.param_groups[0]["params"] = params[1:]
        pipeline.step()
        assert type(params[0].grad) is Tensor
        assert torch.equal(params[0].grad, expected)
