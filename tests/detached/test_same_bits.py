"""What is computed does not depend on when: modes, buckets, links and overlap give the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_optim.engines.scaling import LossScale
from lightning_optim.offload.trace import Trace
from lightning_optim.offload.transport import CopyTransport

from .common import (
    OURS,
    PAIRS,
    UNDOABLE,
    Plan,
    Run,
    assert_close_to,
    assert_same_bits,
    detached,
    known_warnings,
    link,
    loss_of,
    run,
    small,
    weights,
)

pytestmark = known_warnings

#: Clipping bites at some steps and not at others; see `slope`.
LONG = Plan(steps=10, clip=20.0)
FREE = Plan(steps=10, absent=lambda step: () if step != 4 else (1, 2))


@pytest.mark.matrix(unless=lambda name: name in ("adamw, amsgrad", "sgd, dampening", "muon", "torch AdamW", "foreign"))
@pytest.mark.parametrize("name", PAIRS)
def test_modes(name: str) -> None:
    make, _ = PAIRS[name]
    for plan in (LONG, FREE, Plan(steps=5, micro=3, clip=40.0)):
        exact = run(weights(), make, plan, small())
        if plan.clip is not None:
            assert 0 < sum(norm > plan.clip for norm in exact.norms) < plan.steps
        if name in UNDOABLE:
            assert_same_bits(run(weights(), make, plan, small(clip="speculative")), exact)
        if name in OURS and plan.clip is None:
            # The fifth step's backward pass is another than those before and after: nothing may be done too early.
            assert_same_bits(run(weights(), make, plan, small(clip="none")), exact)


@pytest.mark.matrix(unless=lambda name, dtype: dtype == torch.bfloat16 or name == "adamw, amsgrad")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["adamw, amsgrad", "lamb", "sgd, dampening", "torch AdamW", "foreign"])
def test_buckets_and_overlap(name: str, dtype: torch.dtype) -> None:
    make, _ = PAIRS[name]
    for plan in (LONG, FREE, Plan(steps=5, micro=3, absent=lambda step: (step % 6,))):
        first = run(weights(dtype), make, plan, small(bucket_mb=1e-6))
        for bucket_mb in (1e-4, 2e-4, 32.0):
            found = run(weights(dtype), make, plan, small(bucket_mb=bucket_mb))
            if plan.clip is None:
                assert_same_bits(found, first)
            else:  # squares are summed bucket by bucket, in float64
                assert_close_to(found, first, 1e-6)
                assert found.norms == pytest.approx(first.norms, rel=1e-14)
            if plan.micro == 1:  # otherwise gradients that stay in their places are summed in their own type
                assert_same_bits(run(weights(dtype), make, plan, small(bucket_mb=bucket_mb), overlap=False), found)


@pytest.mark.parametrize("mode", ["exact", "speculative", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_jitter(mode: str, seed: int) -> None:
    make, _ = PAIRS["torch AdamW"]
    plan = FREE if mode == "none" else LONG
    first = run(weights(), make, plan, small(), transport=CopyTransport())
    for micro_last in (True, False):
        found = run(weights(), make, plan, small(clip=mode), transport=link(seed), last=micro_last)
        assert_same_bits(found, first)


def changing(mode: str, expects_right: bool) -> tuple[Run, Trace]:
    """The lr is changed between backward pass and step, loss scales overflow and shrink."""
    params = weights()
    make, _ = PAIRS["sgd, dampening"]
    optimizer, trace = make(params), Trace()
    norms: list[float] = []
    with detached(optimizer, small(clip=mode), trace=trace, transport=link(1)) as pipeline:
        scale = 64.0
        for step in range(10):
            loss = loss_of(params, step) * scale
            pipeline.expects = (scale, 20.0) if expects_right else (None, None)
            (loss * (float("inf") if step in (0, 4, 5) else 1.0)).backward()
            if step in (2, 3, 7):
                optimizer.param_groups[0]["lr"] *= 0.7
            found = torch.zeros(())
            pipeline.step(max_grad_norm=20.0, loss=LossScale(torch.tensor(scale), found))
            assert bool(found) == (step in (0, 4, 5))
            scale = scale / 2 if found else scale
            pipeline.zero_grad()
        masters = [pipeline.masters()[p].detach().clone() for p in params]
    return Run(params, optimizer, masters, norms), trace


@pytest.mark.parametrize("expects_right", [True, False])
def test_an_lr_that_changes_before_the_step_and_overflows(expects_right: bool) -> None:
    exact, _ = changing("exact", expects_right)
    speculative, trace = changing("speculative", expects_right)
    assert_same_bits(speculative, exact)
    assert trace.of("undo")


@pytest.mark.parametrize("name", ["adamw, amsgrad", "sgd, dampening", "muon", "torch SGD"])
@pytest.mark.parametrize("mode", ["exact", "speculative"])
def test_an_overflow_changes_nothing(name: str, mode: str) -> None:
    """At the first step no state comes to be; later ones leave every bit."""
    if mode == "speculative" and name not in UNDOABLE:
        pytest.skip("it cannot be taken back")
    make, _ = PAIRS[name]
    params = weights()
    optimizer = make(params)

    def everything() -> Any:
        masters = pipeline.masters()
        values = [*params, *(masters[p] for p in params)]
        slots = {(n, s): v.clone() for n, p in enumerate(params) for s, v in optimizer.state.get(p, {}).items()}
        return [v.detach().clone() for v in values], slots

    with detached(optimizer, small(clip=mode)) as pipeline:
        pipeline.expects = (2.0, None)
        for step in range(4):
            before, slots = everything()
            (loss_of(params, step) * (float("nan") if step % 2 == 0 else 2.0)).backward()
            found = torch.zeros(())
            pipeline.step(loss=LossScale(torch.tensor(2.0), found))
            pipeline.zero_grad()
            after, slots_after = everything()
            assert bool(found) == (step % 2 == 0)
            if step % 2 == 0:
                assert all(map(torch.equal, before, after))
                assert slots.keys() == slots_after.keys()
                assert all(torch.equal(slots[key], slots_after[key]) for key in slots)
                assert bool(slots) == (step > 0)
            else:
                assert not torch.equal(before[0], after[0])
