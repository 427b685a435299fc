"""Lightning's Trainer: steps, resuming, clipping, accumulation and precisions."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_optim import optimizer_info

from .common import (
    UNIQUE,
    AfterEachStep,
    Model,
    asks_for_evaluations,
    assert_close,
    assert_same_state,
    by_hand,
    changed,
    contents,
    each,
    each_kind,
    fit,
    known_warnings,
    maker,
)

pytestmark = known_warnings


@each
def test_trainer(name: str, tmp_path: Path) -> None:
    """Automatic optimization is the four lines of torch, to the bit."""
    model = Model(maker(name), torch.float64)
    fit(tmp_path, model)
    net, optimizer = by_hand(maker(name))
    assert_close(model.net.state_dict(), net.state_dict(), rtol=0, atol=0)
    assert_same_state(
        {**model.trainer.optimizers[0].state_dict(), "param_groups": 0}, {**optimizer.state_dict(), "param_groups": 0}
    )


@each_kind
@each
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "rounding": "stochastic", "state_dtype": "bfloat16"}])
def test_exact_resume(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Train eight steps; or four, save, load with ``weights_only=True``, four more: the same bits."""
    make = maker(name, **options)
    straight, first, second = Model(make), Model(make), Model(make)
    whole = fit(tmp_path, straight, max_epochs=2)
    fit(tmp_path, first).save_checkpoint(tmp_path / "half.ckpt")
    rest = fit(tmp_path, second, tmp_path / "half.ckpt", max_epochs=2)
    assert whole.global_step == rest.global_step == 8
    assert_close(second.state_dict(), straight.state_dict(), rtol=0, atol=0)
    assert_same_state(rest.optimizers[0].state_dict(), whole.optimizers[0].state_dict())


@each_kind
@each
def test_clipping(name: str, tmp_path: Path) -> None:
    """The Trainer's ``gradient_clip_val`` is honoured, and is what ``max_grad_norm`` does inside the step."""
    make = partial(maker, name, **UNIQUE.get(name, {}))
    outside, inside = Model(make(), torch.float64), Model(make(max_grad_norm=0.3), torch.float64)
    fit(tmp_path, outside, gradient_clip_val=0.3)
    fit(tmp_path, inside)
    clipped, _ = by_hand(make(), clip=0.3)
    # Strategies of ours, which those have that ask for evaluations, clip inside the step as well.
    exact: dict[str, float] = {} if asks_for_evaluations(optimizer_info(name).cls) else {"rtol": 0, "atol": 0}
    assert_close(outside.net.state_dict(), clipped.state_dict(), **exact)
    assert_close(inside.net.state_dict(), clipped.state_dict())


@each_kind
@each
def test_clipping_changes_what_a_norm_can_change(name: str, tmp_path: Path) -> None:
    """The cell above would be empty if the gradients' norm never exceeded the limit."""
    norms = AfterEachStep(lambda trainer, _: float(trainer.optimizers[0].grad_norm))  # type: ignore[attr-defined] # ours
    fit(tmp_path, Model(maker(name, max_grad_norm=0.3)), callbacks=[norms])
    assert len(norms.seen) == 4
    assert max(norms.seen) > 0.6


@each_kind
@each
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_clipping_beside_mixed_precision(name: str, precision: str, tmp_path: Path) -> None:
    """Lightning refuses ``gradient_clip_val`` with optimizers that say they unscale gradients themselves."""
    runs = []
    for clip in (None, 0.05):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if precision == "16-mixed" else None
        model = Model(maker(name))
        fit(tmp_path, model, plugins=[MixedPrecision(precision, "cpu", scaler)], gradient_clip_val=clip)  # type: ignore[arg-type]
        runs.append(contents(model))
    assert any(not torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


@each_kind
@each
def test_accumulation(name: str, tmp_path: Path) -> None:
    """Two micro-batches of two are one batch of four."""
    make = maker(name, **UNIQUE.get(name, {}))
    model = Model(make, torch.float64, batch=2)
    fit(tmp_path, model, accumulate_grad_batches=2)
    net, optimizer = by_hand(make)
    assert_close(model.net.state_dict(), net.state_dict())
    assert {int(s["step"]) for s in optimizer.state.values() if "step" in s} <= {3 if name == "soap" else 4}


class Overflowing(Model):
    """The gradient of the third batch does not fit into float16."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 1e30 if batch_idx == 2 else loss


@each_kind
@each
def test_fp16_scaler(name: str, tmp_path: Path) -> None:
    """With a GradScaler: unscaled before the step, and a step that overflows is left out altogether."""
    overflowing, plain = (AfterEachStep(lambda _, module: contents(module)) for _ in range(2))
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    run = fit(tmp_path, Overflowing(maker(name)), plugins=[precision], callbacks=[overflowing])
    moved = [any(not torch.equal(b[k], a[k]) for k in a) for a, b in itertools.pairwise(overflowing.seen)]
    assert moved == [True, False, True]
    for state in run.optimizers[0].state.values():
        assert int(state.get("step", 3)) == (2 if name == "soap" else 3)  # whose first gradient makes state
        assert {v.dtype for v in state.values()} == {torch.float32}
    fit(tmp_path, Model(maker(name)), callbacks=[plain])
    # Gradients of float16 math are off by about 1e-3 of themselves, and themselves at most 3; lr is 0.05.
    assert_close(overflowing.seen[0], plain.seen[0], rtol=0, atol=1e-3)


@each_kind
@each
def test_bf16_true(name: str, tmp_path: Path) -> None:
    """Weights in bfloat16, state in float32, also across a checkpoint."""
    first, second = Model(maker(name)), Model(maker(name))
    half = fit(tmp_path, first, precision="bf16-true")
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = fit(tmp_path, second, tmp_path / "half.ckpt", precision="bf16-true", max_epochs=2)
    for run in (half, rest):
        for p, state in run.optimizers[0].state.items():
            assert p.dtype == torch.bfloat16
            assert {v.dtype for v in state.values()} == {torch.float32}
    assert changed(second.net)
    straight = Model(maker(name))
    fit(tmp_path, straight, precision="bf16-true", max_epochs=2)
    assert_close(second.net.state_dict(), straight.net.state_dict(), rtol=0, atol=0)
