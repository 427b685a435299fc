"""SAM and L-BFGS under ``detached`` and ``optim_auto``: as under ``in_graph``."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import lightning_optim

from .common import fit, known_warnings, scaled
from .replayed import noisy_class, sam

pytestmark = known_warnings

CLIP = {"gradient_clip_val": 0.5}


def assert_same_weights(found: Any, expected: Any) -> None:
    for step, other in zip(found.weights, expected.weights, strict=True):
        for key in step:
            torch.testing.assert_close(step[key], other[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", ["detached", "optim_auto"])
@pytest.mark.parametrize("case", [{}, CLIP | {"accumulate_grad_batches": 4}, CLIP | {"plugins": "scaled"}])
@pytest.mark.parametrize("name", ["ours", "torch SGD", "foreign"])
def test_sam(name: str, case: dict[str, Any], strategy: str) -> None:
    runs = []
    for one in (strategy, "in_graph"):
        options = case | ({"plugins": [scaled()]} if "plugins" in case else {})
        run, noted = fit(noisy_class()(sam(name)), one, **options)
        assert "SAM over" in run.strategy.report()
        runs.append(noted)
    assert_same_weights(*runs)


def test_sam_with_bfloat16_weights_moves_the_weights_and_steps_the_masters() -> None:
    """Perturbed weights are put back bit by bit: masters keep what they have beyond them."""
    run, noted = fit(noisy_class()(sam("ours", rho=1e-4)), "detached", precision="bf16-true")
    assert "masters in float32" in run.strategy.report()
    weights = dict(run.lightning_module.named_parameters())
    masters = run.strategy._ended[run.optimizers[0].base].masters()
    assert all(torch.equal(masters[p].to(torch.bfloat16), p) for p in weights.values())
    assert any(not torch.equal(masters[p], p.float()) for p in weights.values())
    assert len(noted.weights) > 2


@pytest.mark.parametrize("strategy", ["detached", "optim_auto"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_lbfgs(accumulate: int, strategy: str) -> None:
    runs = []
    for one in (strategy, "in_graph"):
        make = partial(lightning_optim.LBFGS, lr=0.5, history_size=4)
        run, noted = fit(noisy_class()(make), one, accumulate_grad_batches=accumulate)
        assert "own step" in run.strategy.report()
        runs.append(noted)
    assert_same_weights(*runs)
    assert not torch.equal(noted.weights[0]["net.0.weight"], noted.weights[-1]["net.0.weight"])
