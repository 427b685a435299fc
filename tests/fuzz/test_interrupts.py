"""Whatever comes in between, and wherever, a step has been taken or it has not; and the next one is right."""

from __future__ import annotations

import random
import sys
from functools import cache
from typing import Any

import torch
from interrupting import Interrupt, anywhere
from optimizers.common import assert_same, known_warnings
from optimizers.two_buckets import Run

from .common import seeds

pytestmark = known_warnings


def begun(name: str, engine: str, first: bool) -> Run:
    run = Run(name, engine)
    for number in range(0 if first else 2):
        run.step(number)
    return run


def steps_after(run: Run) -> Any:
    run.step(11)
    run.step(12)
    return run.contents()


@cache
def undisturbed(name: str, engine: str, first: bool) -> tuple[int, list[tuple[Any, Any]]]:
    """How many calls a step makes; and what there is without it and with it, at once and two steps later."""
    run = begun(name, engine, first)
    ends = [(run.contents(), steps_after(run))]
    run = begun(name, engine, first)
    nowhere = Interrupt(sys.maxsize, anywhere)
    nowhere(lambda: run.step(10))
    return nowhere.calls, [*ends, (run.contents(), steps_after(run))]


def case(seed: int) -> None:
    choose = random.Random(seed)  # noqa: S311 # no secret
    name = choose.choice(["sgd", "adamw", "muon", "adopted"])
    engine, first = choose.choice(["eager", "foreach", "host"]), choose.random() < 0.3
    calls, ends = undisturbed(name, engine, first)
    # Half of them where weights are written, near the end.
    at = choose.randint(1, calls) if choose.random() < 0.5 else calls - choose.randint(0, min(150, calls - 1))
    where = f"seed {seed}: {name} by {engine}, {'first' if first else 'planned'} step, call {at} of {calls}"
    run = begun(name, engine, first)
    Interrupt(at - 1, anywhere)(lambda: run.step(10))
    between = run.contents()
    taken = not all(map(torch.equal, between[0], ends[0][0][0]))
    assert_same(between, ends[taken][0], where)
    assert_same(steps_after(run), ends[taken][1], where)


def test_an_interrupt_at_any_call() -> None:
    for seed in seeds(40):
        case(seed)
