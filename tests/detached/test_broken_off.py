"""A failure at every call of a step in turn, in either thread: the step is not done, or done, and the next is right."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim.offload import Detached, DetachedOptions

from .common import bits, known_warnings, loss_of, weights

pytestmark = known_warnings

SHAPES = [(3, 2), (4,), (2, 2), (0, 3)]
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "clipped": {"max_grad_norm": 1.0},
    "speculative": {"clip": "speculative", "max_grad_norm": 100.0},
    "none": {"clip": "none"},
    "beside": {"device_fraction": 0.5, "max_grad_norm": 1.0},
    "delayed": {"delay_one_step": True},
    "forward": {"wait": "forward"},
}


class Broken(Exception):  # noqa: N818 # as an interrupt is none
    """What is raised."""


class Breaks:
    """Raises at one of the calls that a thread makes."""

    def __init__(self, at: int) -> None:
        self.at, self.count, self.on = at, 0, False

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if self.on and event in ("call", "c_call") and arg is not sys.setprofile:
            self.count += 1
            if self.count == self.at:
                raise Broken

    def install(self) -> None:
        sys.setprofile(self)

    @contextmanager
    def here(self) -> Iterator[None]:
        sys.setprofile(self)
        self.on = True
        try:
            yield
        finally:
            sys.setprofile(None)


class Trial:
    """A few steps, one of which breaks off."""

    def __init__(self, mode: str) -> None:
        options = dict(MODES[mode])
        self.clip = options.pop("max_grad_norm", None)
        self.params = weights(shapes=SHAPES)
        self.net = nn.ParameterList(self.params)
        self.optimizer = lightning_optim.SGD(self.params, lr=0.1, momentum=0.9, dampening=0.5)
        module = self.net if options.get("wait") else None
        self.pipeline = Detached(self.optimizer, DetachedOptions(bucket_mb=1e-5, **options), module=module)
        self.pipeline.expects = (None, self.clip)
        if self.pipeline._landing is not None:
            self.pipeline._landing._called.add(self.net)  # as if a forward pass had been seen

    def backward(self, step: int) -> None:
        loss_of(self.params, step).backward()

    def step(self) -> None:
        self.pipeline.step(max_grad_norm=self.clip)

    def contents(self) -> list[Tensor]:
        self.pipeline.publish()
        masters = self.pipeline.masters()
        slots = [v for p in self.params for v in self.optimizer.state.get(p, {}).values()]
        return [bits(v) for v in (*self.params, *(masters[p] for p in self.params), *slots)]

    def whole(self, step: int) -> None:
        self.backward(step)
        self.step()
        self.pipeline.zero_grad()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def trajectory(mode: str, steps: int) -> list[list[Tensor]]:
    trial, found = Trial(mode), []
    for step in range(steps):
        trial.whole(step)
        found.append(trial.contents())
    trial.pipeline.close()
    return found


def broken(mode: str, when: int, at: int, *, in_worker: bool, right: list[list[Tensor]]) -> bool:
    """Whether the step broke off at all."""
    trial, breaks = Trial(mode), Breaks(at)
    start = list(map(bits, trial.params))
    for step in range(when):
        trial.whole(step)
    trial.pipeline.publish()
    if in_worker and mode not in ("speculative", "none"):
        trial.backward(when)  # otherwise it is part of the step
    if in_worker:
        trial.pipeline._host.submit(breaks.install).result()
        breaks.on = True
    if (in_worker and mode in ("speculative", "none")) or not in_worker:
        trial.backward(when)
    failed = False
    try:
        if in_worker:
            trial.step()
            trial.pipeline.publish()
        else:
            with breaks.here():
                trial.step()
                trial.pipeline.publish()
    except Broken:
        failed = True
    if in_worker:
        breaks.on = False
        trial.pipeline._host.submit(sys.setprofile, None)
    old = [] if not when else right[when - 1]
    try:
        trial.pipeline.zero_grad()
    except RuntimeError:
        assert mode in ("none", "speculative")  # it says that updates cannot be taken back
        return failed
    now = trial.contents()
    untouched = not any(trial.optimizer.state.values()) and same(list(map(bits, trial.params)), start)
    done = same(now, right[when])
    assert done or (same(now, old) if when else untouched), (mode, when, at, in_worker)
    for step in range(when + done, when + 2):
        trial.whole(step)
    assert same(trial.contents(), right[when + 1]), (mode, when, at, in_worker)
    trial.pipeline.close()
    return failed or breaks.count >= at


@pytest.mark.parametrize("in_worker", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_breaks_off(mode: str, in_worker: bool) -> None:
    right = trajectory(mode, 4)
    stride = int(os.environ.get("FUZZ_STRIDE", "101"))
    for when in (0, 2):
        at = 1 + when
        while broken(mode, when, at, in_worker=in_worker, right=right):
            at += stride
        assert at > 3 * stride
    gc.collect()
