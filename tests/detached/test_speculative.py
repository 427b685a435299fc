"""``clip="speculative"`` and ``"none"``: updates before the step, taken back where they turn out to be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_optim.engines.scaling import LossScale
from lightning_optim.offload import Detached
from lightning_optim.offload.trace import Trace

from .common import PAIRS, Plan, back_and_step, bits, detached, known_warnings, loss_of, run, small, weights

pytestmark = known_warnings

make: Any = PAIRS["sgd, dampening"][0]


def test_steps_are_taken_back_when_the_norm_bites_and_only_then() -> None:
    found = run(weights(), make, Plan(clip=20.0), small(clip="speculative"))
    buckets = {event.label for event in found.trace.of("update")}
    bites = sum(norm > 20.0 for norm in found.norms[1:])  # the first window shows what is usual
    assert 0 < bites < 5
    assert len(found.trace.of("undo")) == bites * len(buckets)
    assert len(found.trace.of("update")) == (6 + bites) * len(buckets)


def test_a_norm_that_is_first_wanted_in_the_step_does_not_hide_an_update() -> None:
    """Found once the update is done: a plan of its own must not make that one look undone."""
    ends = []
    for mode in ("exact", "speculative"):
        params, trace = weights(), Trace()
        with detached(make(params), small(clip=mode), trace=trace) as pipeline:
            for step in range(6):
                loss_of(params, step).backward()
                pipeline.step(max_grad_norm=5.0 if step % 2 else None)
                pipeline.zero_grad()
            ends.append([bits(master) for master in pipeline.masters().values()])
    assert trace.of("undo")
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["exact", "speculative", "none"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_infinite_gradients_without_a_loss_scale_are_torchs_own_affair(
    mode: str, value: float, clip: float | None
) -> None:
    if mode == "none" and clip is not None:
        pytest.skip("refused")
    params, masters = weights(), [nn.Parameter(p.detach().float()) for p in weights()]
    stock = torch.optim.SGD(masters, lr=0.02, momentum=0.9)
    with detached(torch.optim.SGD(params, lr=0.02, momentum=0.9), small(clip=mode)) as pipeline:
        pipeline.expects = (None, clip)
        for step in range(3):
            loss = loss_of(params, step) + (params[0].flatten()[3] * value if step == 1 else 0.0)
            loss.backward()
            for number, master in enumerate(masters):
                like = weights()
                factor = loss_of(like, step) + (like[0].flatten()[3] * value if step == 1 else 0.0)
                master.grad = torch.autograd.grad(factor, like)[number].float()
            if clip is not None:
                nn.utils.clip_grad_norm_(masters, clip)
            stock.step()
            pipeline.step(max_grad_norm=clip)
            pipeline.zero_grad()
        for p, master in zip(params, masters, strict=True):
            # Where torch has an infinity we may have a NaN: a weight decay of 0 is a factor, not a case of its own.
            found = pipeline.masters()[p]
            assert torch.equal(found.isfinite(), master.isfinite())
            torch.testing.assert_close(found[found.isfinite()], master[master.isfinite()], rtol=1e-6, atol=1e-6)
    assert not params[0].isfinite().all()
    assert clip is not None or params[1].isfinite().all()


def test_late_gradients_are_added_and_the_update_done_again() -> None:
    ends = []
    for mode in ("exact", "speculative"):
        params, trace = weights(torch.float32), Trace()
        with detached(make(params), small(clip=mode), trace=trace) as pipeline:
            for step in range(4):
                loss_of(params, step).backward()
                if step >= 2:
                    loss_of(params[:3], step, 1).backward()
                pipeline.step()
                pipeline.zero_grad()
            ends.append([bits(master) for master in pipeline.masters().values()])
    assert trace.of("undo")
    assert all(map(torch.equal, *ends))


def test_none_says_so_when_gradients_are_late() -> None:
    params = weights()
    with detached(make(params), small(clip="none")) as pipeline:
        loss_of(params, 0).backward()
        pipeline.step()
        pipeline.zero_grad()
        loss_of(params, 1).backward()
        with pytest.raises(RuntimeError, match=r"bucket \d was updated in the backward pass.*valid: clip='exact'"):
            back_and_step(pipeline, loss_of(params, 2))


@pytest.mark.parametrize("how", ["lr", "dropped", "weight"])
def test_none_says_so_when_something_else_has_changed(how: str) -> None:
    params = weights()
    optimizer = make(params)
    with detached(optimizer, small(clip="none")) as pipeline:
        for step in range(2):
            loss_of(params, step).backward()
            pipeline.step()
            pipeline.zero_grad()
        loss_of(params, 2).backward()
        if how == "lr":
            optimizer.param_groups[0]["lr"] = 1.0
        if how == "weight":
            with torch.no_grad():
                params[0].mul_(2)
        with pytest.raises(RuntimeError, match=r"updated in the backward pass.*valid: clip='exact'"):
            pipeline.zero_grad() if how == "dropped" else pipeline.step()


@pytest.mark.parametrize("asks", [{"max_grad_norm": 1.0}, {"loss": LossScale(torch.tensor(2.0), torch.zeros(()))}])
def test_none_refuses_clipping_and_loss_scales(asks: dict[str, Any]) -> None:
    params = weights()
    with detached(make(params), small(clip="none")) as pipeline:
        loss_of(params, 0).backward()
        before = params[0].detach().clone()
        with pytest.raises(ValueError, match=r"clip='none', and .*; valid: clip='exact' or clip='speculative'"):
            pipeline.step(**asks)
        assert torch.equal(params[0], before)


class Block(nn.Module):
    """One weight, used three times, in segments that are evaluated again in the backward pass."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)
        self.how = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        run: Callable[[Tensor], Tensor] = lambda x: torch.tanh(self.shared(x))  # noqa: E731
        for _ in range(3):
            x = run(x) if self.how is None else checkpoint(run, x, use_reentrant=self.how)
        return self.head(x)


def checkpointed(how: bool | None, mode: str | None, bucket_mb: float = 1e-4, passes: int = 1) -> list[Tensor]:
    net = Block(how)
    params = list(net.parameters())
    optimizer = torch.optim.AdamW(params, lr=0.02)
    pipeline = None if mode is None else Detached(optimizer, small(clip=mode, bucket_mb=bucket_mb))
    fired = 0

    def count(_: Tensor) -> None:
        nonlocal fired
        fired += 1

    net.shared.weight.register_post_accumulate_grad_hook(count)
    for step in range(5):
        for part in range(passes):
            generator = torch.Generator().manual_seed(10 * step + part)
            x = torch.randn(4, 6, generator=generator, requires_grad=True)
            net(x).square().sum().backward()
        if pipeline is None:
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        else:
            pipeline.expects = (None, 1.0)
            pipeline.step(max_grad_norm=1.0)
            pipeline.zero_grad()
    if pipeline is not None:
        pipeline.close()
    assert fired == 5 * passes * (3 if how else 1)  # the trap: a hook that fires three times
    return [p.detach() for p in params]


@pytest.mark.parametrize("mode", ["exact", "speculative"])
@pytest.mark.parametrize("how", [True, False, None])
@pytest.mark.parametrize("passes", [1, 2])
def test_reentrant_checkpointing_fires_gradient_hooks_three_times(how: bool | None, mode: str, passes: int) -> None:
    expected = checkpointed(how, None, passes=passes)
    for bucket_mb in (1e-6, 1.0):
        for p, q in zip(checkpointed(how, mode, bucket_mb, passes), expected, strict=True):
            # The three parts are added in another order, and AdamW divides by the size of their sum.
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_none_with_reentrant_checkpointing() -> None:
    """It learns how often the hooks fire, from the first window."""
    params = checkpointed_without_clipping("none")
    for p, q in zip(params, checkpointed_without_clipping("exact"), strict=True):
        assert torch.equal(p, q)


def checkpointed_without_clipping(mode: str) -> list[Tensor]:
    net = Block(True)
    with detached(torch.optim.AdamW(net.parameters(), lr=0.02), small(clip=mode)) as pipeline:
        for step in range(4):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step), requires_grad=True)
            net(x).square().sum().backward()
            pipeline.step()
            pipeline.zero_grad()
    return [p.detach() for p in net.parameters()]


def test_an_early_update_ends_before_the_step_begins() -> None:
    params, trace = weights(), Trace()
    with detached(make(params), small(clip="speculative"), trace=trace) as pipeline:
        for step in range(2):
            loss_of(params, step).backward()
            for job in [job for bucket in pipeline.buckets for job in bucket.arrivals]:
                job.result()
            assert len(trace.of("update")) == (len(pipeline.buckets) if step else 0)
            pipeline.step()
            pipeline.zero_grad()
            trace.events.clear()
