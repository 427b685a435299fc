"""Callbacks of ours in one training: a range test leaves no trace in what the others do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies.common import EXACT, OPTIMIZERS, Model, assert_same_steps, fit, known_warnings, scaled

from lightning_optim.callbacks import (
    GradientAccumulation,
    GradientClipping,
    LossScaling,
    LRFinder,
    SpikeRollback,
)

pytestmark = known_warnings

MAKES: dict[str, Callable[[], Any]] = {
    "accumulation": lambda: GradientAccumulation({0: 2, 1: 4}),
    "global norm": lambda: GradientClipping(max_norm=0.1),
    "adagc": lambda: GradientClipping(adagc=1.05),
    "loss scaling": lambda: LossScaling(init_scale=256.0),
    "rollback": lambda: SpikeRollback(),
}


@pytest.mark.parametrize("strategy", ["auto", "in_graph", "detached"])
@pytest.mark.parametrize("name", MAKES)
def test_a_range_test_leaves_no_trace(name: str, strategy: str) -> None:
    runs = []
    for finders in ([], [LRFinder(steps=10, apply=False, max_lr=1.0)]):
        torch.manual_seed(0)
        plugins = [scaled()] if name == "loss scaling" else None
        callbacks = [*finders, MAKES[name]()]
        runs.append(fit(Model(OPTIMIZERS["ours"]), strategy, callbacks=callbacks, max_epochs=2, plugins=plugins)[1])
        assert all(finder.test is not None and len(finder.test.losses) == 10 for finder in finders)
    assert_same_steps(*runs, **EXACT)


def test_all_at_once() -> None:
    """Each does its part: windows of two batches, clipped to a norm, with a scale, and a rollback without work."""
    callbacks = [MAKES[name]() for name in ("accumulation", "global norm", "loss scaling", "rollback")]
    run, found = fit(Model(OPTIMIZERS["ours"]), "in_graph", callbacks=callbacks, plugins=[scaled()])
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    stock, expected = fit(Model(OPTIMIZERS["ours"]), "in_graph", plugins=[scaled()], **options)
    assert_same_steps(found, expected)
    assert run.global_step == stock.global_step == 4
