"""What goes wrong on the way comes up in the step, and leaves a pipeline that goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from foreign import Foreign
from torch import Tensor

from lightning_optim.offload.transport import CopyTransport, Ticket

from .common import PAIRS, back_and_step, bits, detached, known_warnings, loss_of, small, weights

pytestmark = known_warnings


class Broken(Ticket):
    def wait(self) -> None:
        raise OSError("the link is down")


class Failing(CopyTransport):
    """Fails as it is told."""

    how = ""

    def fetch(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str) -> Ticket:
        if self.how == "fetch":
            raise OSError("the link is down")
        ticket = super().fetch(sources, targets, label)
        return Broken() if self.how == "fetched" else ticket

    def send(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str, after: Any = None) -> Ticket:
        if self.how == "send":
            raise OSError("the link is down")
        if self.how == "sent":
            for target in targets:
                target.fill_(float("nan"))
            return Broken()
        return super().send(sources, targets, label, after)


def one(pipeline: Any, params: Any, number: int) -> None:
    loss_of(params, number).backward()
    pipeline.step(max_grad_norm=20.0)
    pipeline.zero_grad()


def contents(pipeline: Any) -> list[Tensor]:
    slots = [v for p in pipeline.masters() for v in pipeline.optimizer.state[p].values()]
    return [bits(value) for value in (*pipeline.masters().values(), *slots)]


@pytest.mark.parametrize("mode", ["exact", "speculative"])
@pytest.mark.parametrize("how", ["fetch", "fetched"])
def test_gradients_that_do_not_arrive(how: str, mode: str) -> None:
    params, transport = weights(), Failing()
    with detached(PAIRS["torch AdamW"][0](params), small(clip=mode), transport=transport) as pipeline:
        for number in range(2):
            one(pipeline, params, number)
        before = contents(pipeline)
        transport.how = how
        for _ in range(2):  # as long as the gradients are not forgotten: the others must not be all there is
            with pytest.raises(OSError, match="the link is down"):
                back_and_step(pipeline, loss_of(params, 2), max_grad_norm=20.0)
        if how == "fetched":
            transport.how = ""
            with pytest.raises(OSError, match="the link is down"):
                pipeline.step(max_grad_norm=20.0)
        transport.how = ""
        pipeline.zero_grad()
        pipeline.step(max_grad_norm=20.0)  # nothing to do
        assert all(map(torch.equal, contents(pipeline), before))
        one(pipeline, params, 2)
        assert not torch.equal(contents(pipeline)[1], before[1])


@pytest.mark.parametrize("mode", ["exact", "speculative"])
@pytest.mark.parametrize("how", ["send", "sent"])
def test_weights_that_do_not_arrive_are_sent_again(how: str, mode: str) -> None:
    ends = []
    for fails in (True, False):
        params, transport = weights(), Failing()
        with detached(PAIRS["torch AdamW"][0](params), small(clip=mode), transport=transport) as pipeline:
            for number in range(4):
                transport.how = how if fails and number == 2 and how == "sent" else ""
                if transport.how:
                    with pytest.raises(OSError, match="the link is down"):
                        one(pipeline, params, number)
                    pipeline.zero_grad()
                    assert params[0].isnan().all()
                else:
                    one(pipeline, params, number)
            if how == "send" and fails:
                transport.how = how
                with pytest.raises(OSError, match="the link is down"):
                    one(pipeline, params, 4)
                transport.how = ""
                pipeline.zero_grad()
                one(pipeline, params, 5)
                assert all(p.isfinite().all() for p in params)
            ends.append([bits(v) for v in (*params, *pipeline.masters().values())])
    if how == "sent":  # what failed was a copy, not an update
        assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("mode", ["exact", "speculative", "none"])
@pytest.mark.parametrize("when", [0, 2])
def test_an_engine_that_fails(mode: str, when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket whose update fails is as before, so that its first step is still to come."""
    params = weights()
    clip = None if mode == "none" else 20.0
    optimizer = PAIRS["sgd, dampening"][0](params)
    with detached(optimizer, small(clip=mode, bucket_mb=1.0)) as pipeline:
        (bucket,) = pipeline.buckets
        for number in range(when):
            loss_of(params, number).backward()
            pipeline.step(max_grad_norm=clip)
            pipeline.zero_grad()
        before = contents(pipeline)
        stepper: Any = bucket.stepper

        def table(*args: Any) -> Any:
            raise MemoryError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(stepper, "_table", table)
            with pytest.raises(MemoryError, match="no memory"):
                back_and_step(pipeline, loss_of(params, when), max_grad_norm=clip)
            pipeline.zero_grad()
        assert all(map(torch.equal, contents(pipeline), before))
        if not when:
            assert not any(optimizer.state.values())
        loss_of(params, when).backward()
        pipeline.step(max_grad_norm=clip)
        pipeline.zero_grad()
        if not when:
            assert torch.equal(optimizer.state[params[1]]["momentum_buffer"] == 0, torch.zeros(5, dtype=torch.bool))


def test_an_optimizers_own_step_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights()
    optimizer = Foreign(params, lr=0.01)
    with detached(optimizer) as pipeline:
        one(pipeline, params, 0)

        def fail(*args: Any) -> None:
            raise MemoryError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(Foreign, "_init_group", fail)
            with pytest.raises(MemoryError):
                one(pipeline, params, 1)
        assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], params, strict=True))
        assert set(optimizer.state) == set(params)
        assert all(master.grad is None for master in pipeline.masters().values())
        pipeline.zero_grad()
        one(pipeline, params, 2)


def test_a_backward_pass_that_breaks_off() -> None:
    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise KeyboardInterrupt

    ends = []
    for breaks in (True, False):
        params = weights()
        with detached(PAIRS["torch AdamW"][0](params), small(clip="speculative")) as pipeline:
            for number in range(4):
                if breaks and number == 2:
                    with pytest.raises(KeyboardInterrupt):
                        (loss_of(params[2:], 9) + Break.apply(params[0]).sum() * 2).backward()
                    pipeline.zero_grad()
                one(pipeline, params, number)
            ends.append(contents(pipeline))
    assert all(map(torch.equal, *ends))


def test_a_pipeline_that_is_closed() -> None:
    params = weights()
    optimizer = PAIRS["torch AdamW"][0](params)
    with detached(optimizer, small(clip="speculative")) as pipeline:
        one(pipeline, params, 0)
        before = contents(pipeline)
        loss_of(params, 1).backward()
    slots = [v for p in reversed(params) for v in optimizer.state[p].values()]
    # What was updated before a step that never came has been taken back.
    assert all(torch.equal(bits(slot), old) for slot, old in zip(slots, before[len(params) :], strict=True))
    loss_of(params, 2).backward()
    assert all(p.grad is not None for p in params)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pipeline.step()
