"""``device_fraction``: masters and state of some weights stay on the device. Here it is host memory as well."""

from __future__ import annotations

import pytest
import torch

from .common import (
    OURS,
    PAIRS,
    Plan,
    assert_close_to,
    detached,
    known_warnings,
    link,
    loss_of,
    reference,
    run,
    small,
    weights,
)

pytestmark = known_warnings


@pytest.mark.matrix(
    unless=lambda name, dtype: dtype == torch.bfloat16 and name in ("adamw, amsgrad", "lamb", "muon", "prodigy")
)
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("plan", [Plan(clip=20.0), Plan(scale=8.0, absent=lambda step: (step % 6,))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_steps(name: str, plan: Plan, dtype: torch.dtype) -> None:
    ours, _ = PAIRS[name]
    first = run(weights(dtype), ours, plan, small(bucket_mb=1e-6))
    for fraction in (0.5, 1.0):
        found = run(weights(dtype), ours, plan, small(bucket_mb=1e-6, device_fraction=fraction), transport=link())
        assert_close_to(found, first, 1e-5 if name == "muon" else 1e-6)


def test_speculative_updates_beside_weights_that_stay() -> None:
    ours, theirs = PAIRS["torch AdamW"]
    plan = Plan(clip=20.0)
    found = run(weights(), ours, plan, small(clip="speculative", device_fraction=0.4, bucket_mb=1e-6))
    assert_close_to(found, reference(weights(), theirs, plan))


def test_what_stays_are_the_first_layers() -> None:
    params = weights(torch.float32)
    with detached(PAIRS["torch AdamW"][0](params), small(device_fraction=0.31, bucket_mb=1e-6)) as pipeline:
        stay = [p for bucket in pipeline.buckets if bucket.on_device for p in bucket.params]
        assert {id(p) for p in stay} == {id(p) for p in params[:4]}  # 53 of 173
        masters = pipeline.masters()
        assert all((masters[p] is p) == any(p is q for q in stay) for p in params)
        loss_of(params, 0).backward()
        assert [p.grad is None for p in params] == [False] * 4 + [True] * 2
        report = "\n".join(map(str, pipeline.report()))
        assert "on the device" in report
        assert "in host memory" in report


def test_an_overflow_is_seen_wherever_it_is() -> None:
    from lightning_optim.engines.scaling import LossScale

    for number in (0, 4):
        params = weights(torch.float32)
        with detached(PAIRS["torch AdamW"][0](params), small(device_fraction=0.5, bucket_mb=1e-6)) as pipeline:
            (loss_of(params, 0) + params[number].sum() * float("inf")).backward()
            before, found = [p.detach().clone() for p in params], torch.zeros(())
            pipeline.step(loss=LossScale(torch.tensor(1.0), found))
            assert found.item() == 1
            assert all(map(torch.equal, params, before))
