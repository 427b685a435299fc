"""What Lightning's own clipping does wrong, and ``GradientClipping`` does not."""

from __future__ import annotations

import math
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from strategies.common import (
    EXACT,
    OPTIMIZERS,
    Model,
    assert_same_steps,
    fit,
    network,
    scaled,
)
from torch import Tensor, nn

from lightning_optim.callbacks import GradientClipping
from lightning_optim.control.clipping import NonfiniteGradientError

from .clipped import (
    EACH_STRATEGY,
    EACH_WAY,
    STRATEGIES,
    Manual,
    by_hand,
    clipping,
    known_warnings,
)

pytestmark = [*known_warnings, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("ours", [False, True])
def test_manual_optimization_clips_what_is_unscaled(ours: bool) -> None:
    """PL#18089, PL#9694: ``clip_gradients`` comes before ``unscale_``, so that a limit of 0.5 becomes 0.5 / 256."""
    torch_sgd = OPTIMIZERS["torch SGD"]
    callbacks = [clipping("max_norm")] if ours else []
    _, found = fit(Manual(torch_sgd, clip=0.0 if ours else 0.5), "auto", plugins=[scaled()], callbacks=callbacks)
    expected = by_hand("max_norm", "16-mixed", name="torch SGD")
    before = dict(network().named_parameters())
    moved, right = (
        sum(float((weights[f"net.{key}"] - p.detach()).abs().sum()) for key, p in before.items())
        for weights in (found.weights[0], expected.weights[0])
    )
    if ours:
        assert_same_steps(found, expected)
    else:
        assert moved == pytest.approx(right / 256, rel=0.01)


def test_fused_optimizers_are_clipped_in_mixed_precision() -> None:
    """Lightning's own clipping raises, as such an optimizer unscales the gradients in its step (amp.py)."""
    fused = partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1, fused=True)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Model(fused), "auto", plugins=[scaled()], gradient_clip_val=0.5)
    for strategy, way in product(STRATEGIES, ("max_norm", "adagc")):
        _, found = fit(Model(fused), strategy, plugins=[scaled()], callbacks=[clipping(way)])
        assert_same_steps(found, by_hand(way, "16-mixed"))


def test_fsdp1() -> None:
    """PL#19235: Lightning's plugin for FSDP1 refuses the global norm; the wrapped model's own method knows it."""
    from lightning.pytorch.plugins.precision import FSDPPrecision

    with pytest.raises(Exception, match=r"'norm'. is currently not supported"):
        FSDPPrecision("32-true").clip_gradients(torch.optim.SGD(network().parameters(), 0.1), 0.5)

    class Wrapped(nn.Module):  # as FSDP1's class, which needs a process group
        called: tuple[float, ...] = ()

        def clip_grad_norm_(self, max_norm: float) -> Tensor:
            self.called = (*self.called, max_norm)
            return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    class Wraps(GradientClipping):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_fit_start(trainer, pl_module)
            trainer.strategy.model = wrapped
            trainer.strategy.training_step = lambda *args: pl_module.training_step(*args)

    model, wrapped = Model(), Wrapped()
    _, found = fit(model, "auto", callbacks=[Wraps(max_norm=0.5)])
    assert wrapped.called == (0.5,) * 8
    assert_same_steps(found, by_hand("max_norm"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("strategy", ["auto", "in_graph", "detached"])
@pytest.mark.parametrize("model", [Model, Manual])
def test_gradients_that_are_not_finite(model: Any, strategy: str, precision: str) -> None:
    """Clipped by Lightning's own parts, one NaN becomes NaN in every weight, without a word."""

    class Overflowing(model):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            self.net[0].bias.register_hook(lambda g: g * math.nan if batch_idx == 3 else g)
            return super().training_step(batch, batch_idx)

    if model is Model:
        _, found = fit(Overflowing(), "auto", gradient_clip_val=0.5, precision=precision)
        assert all(bool(p.isnan().all()) for p in found.weights[3].values())
    callback = clipping("max_norm", error_if_nonfinite=True)
    with pytest.raises(NonfiniteGradientError, match=r"infinite or NaN: those of net.0.bias \(of 6 parameters\)"):
        fit(Overflowing(), strategy, precision=precision, callbacks=[callback])


@pytest.mark.matrix(unless=lambda way, model: (way == "adagc") == (model is Model))
@pytest.mark.parametrize("model", [Model, Manual])
@EACH_STRATEGY
@EACH_WAY
def test_a_step_that_the_scaler_skips_raises_nothing(way: str, strategy: str, model: Any) -> None:
    overflowing, callback = model(), clipping(way, error_if_nonfinite=True)
    overflowing.overflows = {3}
    run, found = fit(overflowing, strategy, plugins=[scaled()], callbacks=[callback])
    assert run.precision_plugin.scaler.get_scale() == 128.0
    for ours, theirs in zip(found.weights[:3], by_hand(way, "16-mixed").weights[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.weights[3], found.weights[2], **EXACT)
    assert all(bool(p.isfinite().all()) for p in found.weights[-1].values())
    if way == "adagc":
        assert int(callback.state_dict()["optimizers"][0]["steps"]) == 7


@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_without_a_loss(fused: bool) -> None:
    """Lightning leaves the step out, before it would unscale: what is there must be left as it is."""

    class Skips(Model):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return None if batch_idx in (1, 4) else super().training_step(batch, batch_idx)

    callback = clipping("adagc")
    make = partial(torch.optim.AdamW, lr=0.05, fused=fused)
    _, found = fit(Skips(make), "auto", plugins=[scaled()], accumulate_grad_batches=2, callbacks=[callback])
    torch.testing.assert_close(found.weights[1], found.weights[0], **EXACT)
    assert int(callback.state_dict()["optimizers"][0]["steps"]) == 3
    assert all(float(average) < 30 for average in callback.state_dict()["optimizers"][0]["averages"].values())
