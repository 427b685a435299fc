"""Nothing happens too early: seen in the records of a slow and irregular link, and as NaN where it would have been."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.offload.link import SimulatedLink
from lightning_optim.offload.trace import Event, Trace
from lightning_optim.offload.transport import CopyTransport, Ticket

from .common import PAIRS, detached, known_warnings, link, loss_of, small, weights

pytestmark = known_warnings


def steps(mode: str, clip: float | None, seed: int, count: int = 5) -> list[list[Event]]:
    """The events of each step, with its backward pass."""
    trace, found = Trace(), []
    params = weights()
    transport = link(seed, trace)
    with detached(PAIRS["torch AdamW"][0](params), small(clip=mode), transport=transport, trace=trace) as pipeline:
        pipeline.expects = (None, clip)
        for step in range(count):
            loss_of(params, step).backward()
            pipeline.step(max_grad_norm=clip)
            pipeline.zero_grad()
            found.append(list(trace.events))
            trace.events.clear()
        assert not any(p.isnan().any() for p in params)
    return found


def of(events: Sequence[Event], kind: str, label: str | None = None) -> list[Event]:
    return [event for event in events if event.kind == kind and label in (None, event.label)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("mode", "clip"), [("exact", 20.0), ("speculative", 20.0), ("speculative", None), ("none", None)]
)
def test_what_happens_before_what(mode: str, clip: float | None, seed: int) -> None:
    before: list[Event] = []
    for events in steps(mode, clip, seed):
        buckets = {event.label for event in of(events, "fetch")}
        assert len(buckets) > 3
        for bucket in buckets:
            (fetched,) = of(events, "fetch", bucket)
            (sent,) = of(events, "send", bucket)
            updates = of(events, "update", bucket)
            assert len(of(events, "norm", bucket)) == (clip is not None)
            assert all(event.begin >= fetched.end for event in of(events, "norm", bucket) + updates)
            assert len(updates) == 1 + len(of(events, "undo", bucket))
            assert all(undone.begin >= updates[0].end for undone in of(events, "undo", bucket))
            assert sent.begin >= updates[-1].end
            assert all(update.begin >= earlier.end for update in updates for earlier in of(before, "send", bucket))
        norms = [event.end for event in of(events, "norm")]
        if clip is not None:
            done = [of(events, "update", bucket)[-1] for bucket in buckets]
            if mode == "exact" or of(events, "undo"):
                assert all(update.begin >= max(norms) for update in done)
            assert min(event.begin for event in of(events, "send")) >= max(norms)
        before = events


def test_updates_run_in_the_backward_pass_when_they_may() -> None:
    for mode, early in (("exact", False), ("speculative", True), ("none", True)):
        *_, events = steps(mode, None, 0)
        last = max(event.begin for event in of(events, "fetch"))
        assert (min(event.begin for event in of(events, "update")) < last) == early


def test_the_first_layers_weights_leave_first() -> None:
    *_, events = steps("exact", 20.0, 0)
    arrived = [event.label for event in of(events, "norm")]
    assert [event.label for event in of(events, "update")] == sorted(arrived, reverse=True)


class Early(Ticket):
    """Says that a copy is done while it is not."""


class Lying(SimulatedLink):
    def __init__(self, direction: str) -> None:
        super().__init__(1e9, 0.05, poison=True)
        self.direction = direction

    def fetch(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str) -> Ticket:
        ticket = super().fetch(sources, targets, label)
        return Early() if self.direction == "fetch" else ticket

    def send(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str, after: Any = None) -> Ticket:
        ticket = super().send(sources, targets, label, after)
        return Early() if self.direction == "send" else ticket


@pytest.mark.parametrize("direction", ["fetch", "send", "neither"])
def test_a_wait_for_the_wrong_stream_shows_as_nan(direction: str) -> None:
    """So that the tests here can fail: what reads before a copy is done reads NaN."""
    params = weights(torch.float32)
    transport = Lying(direction)
    with detached(PAIRS["torch SGD"][0](params), transport=transport) as pipeline:
        loss_of(params, 0).backward()
        pipeline.step()
        seen = [p.detach().clone() for p in params if p.numel()]
    assert any(p.isnan().any() for p in seen) == (direction != "neither")


def test_what_is_not_stepped_is_not_sent() -> None:
    sent: list[int] = []

    class Counting(CopyTransport):
        def send(self, sources: Sequence[Tensor], targets: Sequence[Tensor], label: str, after: Any = None) -> Ticket:
            sent.append(len(sources))
            return super().send(sources, targets, label, after)

    params = weights()
    with detached(PAIRS["torch SGD"][0](params), small(bucket_mb=1.0), transport=Counting()) as pipeline:
        for step in range(2):
            loss_of(params, step, absent=(0, 3)).backward()
            pipeline.step()
            pipeline.zero_grad()
    assert sent == [4, 4]
