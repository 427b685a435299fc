"""``step_in_backward`` and ``capture``: steps as ever, or an error before the first one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import lightning_optim
from lightning_optim.strategies import InGraphStrategy
from lightning_optim.warnings import LightningOptimWarning

from .common import EXACT, OPTIMIZERS, Model, assert_same_state, assert_same_steps, fit, known_warnings, scaled

pytestmark = known_warnings


class Watched(Model):
    """Counts the gradients that exist when a batch's backward pass has ended."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.left: list[int] = []

    def on_after_backward(self) -> None:
        self.left.append(sum(p.grad is not None for p in self.parameters()))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
@pytest.mark.filterwarnings("ignore:step_in_backward.*memory is not saved")
def test_the_backward_pass_steps(options: dict[str, Any]) -> None:
    model = Watched(OPTIMIZERS["ours"])
    run, found = fit(model, InGraphStrategy(step_in_backward=True), **options)
    stock, expected = fit(Model(OPTIMIZERS["ours"]), "auto", **options)
    assert_same_steps(found, expected, **EXACT)
    assert_same_state(run.optimizers[0].state_dict(), stock.optimizers[0].state_dict())
    window = options.get("accumulate_grad_batches", 1)
    parameters = len(list(model.parameters()))
    assert model.left[:window] == [parameters] * window  # the first window observes
    assert model.left[window:] == ([parameters] * (window - 1) + [0]) * (len(model.left) // window - 1)


def test_clipping_in_the_backward_pass_is_the_approximation_that_was_asked_for() -> None:
    ends = []
    for how in ("per_tensor", "previous_norm"):
        _, found = fit(Model(OPTIMIZERS["ours"]), InGraphStrategy(step_in_backward=how), gradient_clip_val=0.5)
        ends.append(found.weights)
    _, exact = fit(Model(OPTIMIZERS["ours"]), "auto", gradient_clip_val=0.5)
    for name, value in exact.weights[0].items():
        torch.testing.assert_close(ends[1][0][name], value)  # the first step has all gradients
    assert any(not torch.equal(ends[0][-1][name], ends[1][-1][name]) for name in exact.weights[-1])


class OwnClipping(Model):
    """Does something of its own with gradients."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, in fact."""


class Manual(Model):
    """Steps when it wants to."""

    def __init__(self, make: Any) -> None:
        super().__init__(make)
        self.automatic_optimization = False


ours = OPTIMIZERS["ours"]
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "norm": (Model, True, {"gradient_clip_val": 0.5}, ValueError, r"gradient_clip_val=0.5.*'per_tensor' or"),
    "value": (Model, True, {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, ValueError, "'value'"),
    "nothing to clip": (Model, "per_tensor", {}, ValueError, "gradient_clip_val is not set"),
    "scaler": (Model, True, {"plugins": [scaled()]}, ValueError, "known only after the last gradient"),
    "hook": (OwnClipping, True, {}, ValueError, "configure_gradient_clipping of the module's own"),
    "manual": (Manual, True, {}, ValueError, "manual optimization"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_all_gradients_is_refused(case: str) -> None:
    model, how, options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        fit(model(ours), InGraphStrategy(step_in_backward=how), **options)


def test_wrong_values_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"step_in_backward='global'; valid: False, True, per_tensor, previous_norm"):
        InGraphStrategy(step_in_backward="global")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"capture=True with step_in_backward=True.*valid: one of them"):
        InGraphStrategy(capture=True, step_in_backward=True)
    with pytest.raises(TypeError, match="SGD does not step parameter by parameter"):
        fit(Model(OPTIMIZERS["torch SGD"]), InGraphStrategy(step_in_backward=True))


def test_accumulation_is_said_not_to_save_memory() -> None:
    with pytest.warns(LightningOptimWarning, match="accumulate_grad_batches=3: gradients exist together"):
        fit(Model(ours), InGraphStrategy(step_in_backward=True), accumulate_grad_batches=3)


@pytest.mark.parametrize("name", ["ours", "torch AdamW"])
def test_capturing_without_a_gpu_warns_and_steps(name: str) -> None:
    with pytest.warns(LightningOptimWarning, match="not captured as a CUDA graph"):
        run, found = fit(Model(OPTIMIZERS[name]), InGraphStrategy(capture=True, engine="eager"))
    _, expected = fit(Model(OPTIMIZERS[name]), InGraphStrategy(engine="eager"))
    assert_same_steps(found, expected, **EXACT)
    if name == "ours":
        assert not run.optimizers[0].options.capture  # as it was before


def test_hooks_are_gone_after_the_fit() -> None:
    model = Model(partial(lightning_optim.SGD, lr=0.1))
    fit(model, InGraphStrategy(step_in_backward=True))
    before = [p.detach().clone() for p in model.parameters()]
    nn.functional.mse_loss(model.net(torch.ones(2, 6)), torch.ones(2, 1)).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is not None for p in model.parameters())
