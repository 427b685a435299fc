"""Checkpoints of detached trainings: to and from all other strategies, bit by bit, and after a sudden death."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import Foreign
from torch import Tensor

from lightning_optim.strategies import DetachedStrategy

from .common import EXACT, OPTIMIZERS, Model, assert_same_state, assert_same_steps, fit, known_warnings
from .masters import Straight

pytestmark = known_warnings

ORDERS = [("auto", "detached"), ("detached", "auto"), ("in_graph", "detached"), ("detached", "in_graph")]
MAKERS: dict[str, Any] = {
    "torch AdamW": partial(torch.optim.AdamW, lr=0.05),
    "foreign": partial(Foreign, lr=0.01),
    "ours": OPTIMIZERS["ours"],
}


@pytest.mark.matrix(unless=lambda name, options: bool(options) and name in ("ours", "foreign"))
@pytest.mark.parametrize(("first", "second"), [*ORDERS, ("detached", "detached")])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}])
def test_resuming(name: str, options: dict[str, Any], first: str, second: str, tmp_path: Path) -> None:
    """Eight steps by one, eight by the other, and sixteen by one alone."""
    half, _ = fit(Model(OPTIMIZERS[name]), first, **options)
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest, found = fit(Model(OPTIMIZERS[name]), second, ckpt_path=tmp_path / "half.ckpt", max_epochs=2, **options)
    straight, expected = fit(Model(OPTIMIZERS[name]), second, max_epochs=2, **options)
    expected.weights, expected.lrs = expected.weights[8:], expected.lrs[8:]
    assert_same_steps(found, expected, **EXACT if first == second else {})
    assert_same_state(rest.optimizers[0].state_dict(), straight.optimizers[0].state_dict())


@pytest.mark.parametrize("clip", ["exact", "speculative"])
@pytest.mark.parametrize("name", MAKERS)
def test_masters_are_resumed_bit_by_bit(name: str, clip: Any, tmp_path: Path) -> None:
    if name == "foreign" and clip != "exact":
        pytest.skip("an optimizer that runs its own step does so for all masters at once")
    make = MAKERS[name]

    def strategy() -> DetachedStrategy:
        return DetachedStrategy(clip=clip)

    options: dict[str, Any] = {"precision": "bf16-true", "gradient_clip_val": 0.5}
    half, _ = fit(Straight(make), strategy(), **options)
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest, found = fit(Straight(make), strategy(), ckpt_path=tmp_path / "half.ckpt", max_epochs=2, **options)
    straight, expected = fit(Straight(make), strategy(), max_epochs=2, **options)
    expected.weights, expected.lrs = expected.weights[8:], expected.lrs[8:]
    assert_same_steps(found, expected, **EXACT)
    ours, theirs = (
        run.strategy._ended[run.optimizers[0]].masters().values()  # the masters too
        for run in (rest, straight)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    state = rest.optimizers[0].state_dict()["state"].values()
    assert all(t.dtype == torch.float32 for slots in state for t in slots.values() if isinstance(t, Tensor))


def test_stale_masters_are_left_alone(tmp_path: Path) -> None:
    """A checkpoint whose weights were changed after it was written: the weights are meant."""
    options: dict[str, Any] = {"precision": "bf16-true"}
    run, _ = fit(Straight(MAKERS["torch AdamW"]), "detached", **options)
    run.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    for weight in saved["state_dict"].values():
        weight.add_(1)
    torch.save(saved, tmp_path / "one.ckpt")

    class Start(Straight):
        def on_train_start(self) -> None:
            self.start = [p.detach().clone() for p in self.parameters()]
            (detached,) = (drive.detached for drive in self.trainer.strategy._drives.values())
            self.masters = [detached.masters()[p].detach().clone() for p in self.parameters()]

    model = Start(MAKERS["torch AdamW"])
    with pytest.warns(UserWarning, match="have changed since: the weights are taken"):
        fit(model, "detached", ckpt_path=tmp_path / "one.ckpt", max_epochs=2, **options)
    assert all(torch.equal(a, b.float()) for a, b in zip(model.masters, model.start, strict=True))


def test_float32_weights_need_no_masters_in_checkpoints(tmp_path: Path) -> None:
    run, _ = fit(Model(OPTIMIZERS["ours"]), "detached")
    run.save_checkpoint(tmp_path / "one.ckpt")
    assert torch.load(tmp_path / "one.ckpt", weights_only=True)["detached_masters"] == [{}]
