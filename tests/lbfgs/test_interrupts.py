"""A step that is interrupted at any call leaves the old weights or the new ones, and a history that is right."""

from __future__ import annotations

import copy
from itertools import count
from typing import Any

import pytest
import torch
from interrupting import Interrupt, is_one_of, ours

from lightning_optim import LBFGS

from .common import regression, values


def run(options: dict[str, Any]) -> tuple[Any, Any, LBFGS]:
    params, problem = regression(torch.float32, ((3, 2), (4,)))
    optimizer = LBFGS(params, history_size=2, **options)
    for _ in range(3):  # the history is full
        optimizer.step(problem)
    return params, problem, optimizer


@pytest.mark.parametrize("options", [{}, {"line_search": "armijo", "reuse_evaluation": True}, {"noise": 1e-4}])
def test_at_every_call(options: dict[str, Any]) -> None:
    params, problem, optimizer = run(options)
    before = values(params)
    optimizer.step(problem)
    after = values(params)
    interrupts = 0
    for number in count(len(options), 17):  # a sample
        params, problem, optimizer = run(options)
        if not Interrupt(number, ours)(lambda: optimizer.step(problem)):  # noqa: B023
            break
        interrupts += 1
        now = values(params)
        assert is_one_of(now, before, after), f"call {number}"
        _check_history(optimizer)
        loss = problem.loss()
        optimizer.step(problem)
        assert problem.loss() < loss
    assert interrupts > 20


def _check_history(optimizer: LBFGS) -> None:
    """The products of the pairs are those of the pairs that are there."""
    assert optimizer._work is not None
    history = copy.deepcopy(optimizer._work.history)
    if history.pending:
        history._products()
    for a, b in ((a, b) for i, a in enumerate(history.order) for b in history.order[i:]):
        sy = float(history.slab[:, 2 * a].flatten().double() @ history.slab[:, 2 * b + 1].flatten().double())
        assert history.sy[a, b].item() == pytest.approx(sy, rel=1e-4, abs=1e-6)
