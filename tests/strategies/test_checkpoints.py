"""Checkpoints are those of Lightning's own strategies, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .common import EXACT, OPTIMIZERS, Model, assert_same_state, assert_same_steps, fit, known_warnings

pytestmark = known_warnings

ORDERS = pytest.mark.parametrize(
    ("first", "second"), [("auto", "in_graph"), ("in_graph", "auto"), ("in_graph", "in_graph")]
)


@pytest.mark.matrix(unless=lambda name, options: bool(options) or name == "ours")
@ORDERS
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}])
def test_resuming(name: str, options: dict[str, Any], first: str, second: str, tmp_path: Path) -> None:
    """Four steps by one, four by the other, and eight by one alone."""
    half, _ = fit(Model(OPTIMIZERS[name]), first, **options)
    half.save_checkpoint(tmp_path / "half.ckpt")
    start: list[dict[str, torch.Tensor]] = []

    class Resumed(Model):
        def on_train_start(self) -> None:
            start.append({key: value.clone() for key, value in self.state_dict().items()})

    rest, found = fit(Resumed(OPTIMIZERS[name]), second, ckpt_path=tmp_path / "half.ckpt", max_epochs=2, **options)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert start[0].keys() == saved["state_dict"].keys()
    assert all(torch.equal(value, saved["state_dict"][key]) for key, value in start[0].items())
    straight, expected = fit(Model(OPTIMIZERS[name]), second, max_epochs=2, **options)
    expected.weights, expected.lrs = expected.weights[8:], expected.lrs[8:]
    # One engine all the way, or one that nothing distinguishes from the other: the same bits.
    exact = first == second or name == "foreign" or (name == "ours" and not options)
    assert_same_steps(found, expected, **EXACT if exact else {})
    assert_same_state(rest.optimizers[0].state_dict(), straight.optimizers[0].state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_contents(name: str, tmp_path: Path) -> None:
    """Keys, shapes and types, down to the optimizer's counters."""

    def layout(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: layout(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [layout(inner) for inner in value]
        return (value.shape, value.dtype, value.device) if isinstance(value, torch.Tensor) else type(value)

    layouts = []
    for strategy in ("in_graph", "auto"):
        run, _ = fit(Model(OPTIMIZERS[name]), strategy)
        run.save_checkpoint(tmp_path / "one.ckpt")
        layouts.append(layout(torch.load(tmp_path / "one.ckpt", weights_only=True)))
    assert layouts[0] == layouts[1]
