"""Lightning's own strategies with SAM and L-BFGS: what they do right runs, anything else is refused."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch

import lightning_optim

from .common import ROOTS, fit, known_warnings
from .replayed import BASES, ByHand, assert_weights, noisy_class, sam

pytestmark = [*known_warnings, pytest.mark.usefixtures("one_thread")]

lbfgs = partial(lightning_optim.LBFGS, history_size=3)
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "SAM, accumulation": (sam(), {"accumulate_grad_batches": 4}, "SAM under .*accumulate_grad_batches=4, where"),
    "SAM, scaler": (sam(), {"plugins": True}, "SAM under .*loss scaler gives it no closure"),
    "SAM, clip by value": (
        sam(),
        {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
        "SAM under .*gradient_clip_val=0.5",
    ),
    "LBFGS, accumulation": (lbfgs, {"accumulate_grad_batches": 2}, "LBFGS under .*accumulate_grad_batches=2"),
    "LBFGS, clip": (lbfgs, {"gradient_clip_val": 0.5}, "LBFGS under .*gradient_clip_val=0.5"),
    "LBFGS, scaler": (lbfgs, {"plugins": True}, "LBFGS under .*no closure"),
}


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, root: str) -> None:
    make, options, message = REFUSED[case]
    if "plugins" in options:
        options = {"plugins": [import_module(f"{root}.plugins").MixedPrecision("16-mixed", "cpu")]}
    with pytest.raises(ValueError, match=message + r".*Valid: Trainer\(strategy=\.\.\.\) with one of 'in_graph'"):
        fit(noisy_class(root)(make), "auto", **options)


def test_windows_that_grow_later() -> None:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    with pytest.raises(ValueError, match="accumulate_grad_batches=4"):
        fit(noisy_class()(sam()), "auto", callbacks=[GradientAccumulationScheduler({3: 4})])


def test_whole_batches_are_right() -> None:
    class Reseeding(noisy_class()):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            torch.manual_seed(1000 + batch_idx)
            return super().training_step(batch, batch_idx)

    model = Reseeding(sam())
    _, found = fit(model, "auto", gradient_clip_val=0.5)
    assert_weights(found, ByHand(BASES["ours"], clip=0.5).fit(), rtol=1e-6, atol=1e-6)
    fit(noisy_class()(lbfgs), "auto")


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}], ids=str)
def test_others_are_left_alone(options: dict[str, Any]) -> None:
    """Also torch's LBFGS, whose users may never have heard of this package."""
    for make in (BASES["ours"], partial(torch.optim.LBFGS, max_iter=2)):
        fit(noisy_class()(make), "auto", max_steps=1, **options)


def test_a_scaler_that_calls_without_a_closure() -> None:
    """Where nobody guards, the step itself does."""
    optimizer = sam()([torch.nn.Parameter(torch.ones(2))])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(optimizer.param_groups[0]["params"][0].sum()).backward()
    with pytest.raises(RuntimeError, match=r"SAM: step\(\) without a closure.*AdamW.* alone; valid: step\(closure\)"):
        scaler.step(optimizer)
