"""Optimizers that search along a line: their closure is the whole window, whatever the Trainer does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim.strategies import InGraphStrategy

from .common import ROOTS, fit, known_warnings, scaled
from .replayed import ByHand, assert_weights, noisy_class

pytestmark = [*known_warnings, pytest.mark.usefixtures("one_thread")]

#: Of line searches, whose every step depends on all evaluations before it.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}

torchs = partial(torch.optim.LBFGS, lr=0.5, max_iter=4, history_size=5, line_search_fn="strong_wolfe")
ours = partial(lightning_optim.LBFGS, history_size=5)


class Halving(torch.optim.Optimizer):
    """Steepest descent with a step that is halved until the loss is smaller; notes what its closure returned."""

    needs_closure = True

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})
        self.values: list[list[float]] = []
        self.norms: list[float] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        assert closure is not None
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.enable_grad():
            before = closure()
        self.values.append([before.item()])
        grads, old = [p.grad.clone() for p in params], [p.clone() for p in params]
        self.norms.append(nn.utils.get_total_norm(grads).item())
        t = self.param_groups[0]["lr"]
        while True:
            for p, start, g in zip(params, old, grads, strict=True):
                p.copy_(start - t * g)
            with torch.enable_grad():
                self.values[-1].append(closure().item())
            if self.values[-1][-1] < before or t < 1e-6:
                return before
            t /= 2


class InALoop(ByHand):
    """The same training, with a closure over the window, in which buffers are those before the first evaluation."""

    def step(self, window: list[tuple[int, Tensor, Tensor]]) -> None:
        buffers = [[b.clone() for b in self.net.buffers()]]
        count = 0

        def closure() -> Tensor:
            nonlocal count
            count += 1
            for now, start in zip(self.net.buffers(), buffers[0], strict=True):
                now.copy_(start)
            seen = len(self.losses)
            found = self.gradients(window)
            loss = sum(self.losses[seen:]) / self.accumulate
            del self.losses[seen:]
            for p, g in zip(self.net.parameters(), found, strict=True):
                p.grad = g
            if count == 1:
                buffers.append([b.clone() for b in self.net.buffers()])
            finite = self.scaler is None or all(g.isfinite().all() for g in found)
            return torch.tensor(loss if finite else torch.inf)

        self.optimizer.step(closure)
        for now, after in zip(self.net.buffers(), buffers[1], strict=True):
            now.copy_(after)


@pytest.mark.parametrize("strategy", ["in_graph", "detached"])
@pytest.mark.parametrize("accumulate", [1, 3, 4])
@pytest.mark.parametrize("make", [torchs, ours, Halving])
def test_steps(make: Any, accumulate: int, strategy: str) -> None:
    model = noisy_class()(make)
    run, found = fit(model, strategy, accumulate_grad_batches=accumulate)
    expected = InALoop(make, accumulate=accumulate).fit()
    assert_weights(found, expected, **CLOSE)
    for buffer, theirs in zip(model.net.buffers(), expected.net.buffers(), strict=True):
        torch.testing.assert_close(buffer, theirs, **CLOSE)
    assert model.evaluated > 8  # else nothing was searched for
    hooks = {name: model.called.count(name) for name in ("zero_grad", "before_backward", "after_backward")}
    assert hooks == {"zero_grad": -(-8 // accumulate), "before_backward": 8, "after_backward": 8}
    assert run.global_step == -(-8 // accumulate)
    assert "step" not in vars(run.optimizers[0])


@pytest.mark.parametrize("root", ROOTS)
def test_the_first_evaluation_is_lightnings(root: str) -> None:
    """A search that needs no more than one does not evaluate again."""

    class Once(Halving):
        def step(self, closure: Any = None) -> Any:
            return closure()

    model = noisy_class(root)(Once)
    fit(model, accumulate_grad_batches=4)
    assert model.evaluated == 8


def test_the_same_weights_give_the_same_bits() -> None:
    """Losses of which a line search takes differences."""

    class Twice(Halving):
        def step(self, closure: Any = None) -> Any:
            first, grads = closure(), [p.grad.clone() for p in self.param_groups[0]["params"]]
            again = closure()
            assert torch.equal(first, again)
            assert all(torch.equal(p.grad, g) for p, g in zip(self.param_groups[0]["params"], grads, strict=True))
            return first

    model = noisy_class()(Twice)
    fit(model, accumulate_grad_batches=4)
    assert model.evaluated == 16


def test_schedules_and_step_hooks() -> None:
    class Scheduled(noisy_class()):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = self.make(self.parameters())
            self.steps = 0
            optimizer.register_step_post_hook(lambda *_: setattr(self, "steps", self.steps + 1))
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    model = Scheduled(Halving)
    run, found = fit(model, accumulate_grad_batches=4)
    assert model.steps == 2
    assert found.lrs == [pytest.approx(1 / n) for n in (1, 1, 1, 2, 2, 2, 2, 3)]
    assert hasattr(run.optimizers[0].step, "_wrapped_by_lr_sched")


@pytest.mark.parametrize("strategy", ["in_graph", "detached"])
@pytest.mark.parametrize("make", [ours, Halving])
def test_16_mixed(make: Any, strategy: str) -> None:
    """Evaluations are scaled and unscaled; float16 losses of weights a bit apart make the tolerance."""
    model = noisy_class()(make)
    run, found = fit(model, strategy, plugins=[scaled()], accumulate_grad_batches=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.ones(()))
    expected = InALoop(make, accumulate=4, scaler=scaler).fit()
    assert_weights(found, expected, rtol=1e-3, atol=1e-3)
    assert model.evaluated > 8
    assert run.precision_plugin.scaler.get_scale() == 256.0
    assert run.precision_plugin.scaler._get_growth_tracker() == 2  # once per step


def test_an_overflow_in_the_search() -> None:
    """The closure says that the loss is infinite; the scale is that of the first evaluation's gradients."""

    class Overflowing(noisy_class()):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            return {"loss": output["loss"] * (1e30 if self.evaluated == 5 else 1)}

    model = Overflowing(Halving)
    run, _ = fit(model, plugins=[scaled()], accumulate_grad_batches=4, max_steps=1)
    (values,) = run.optimizers[0].values
    assert values[1] == float("inf")
    assert values[-1] < values[0]
    assert run.precision_plugin.scaler.get_scale() == 256.0


def test_an_overflow_before_the_search() -> None:
    """The step is left out, and the scale halved."""
    model = noisy_class()(Halving)
    model.overflows = {2}
    run, found = fit(model, plugins=[scaled()], accumulate_grad_batches=4)
    (values,) = run.optimizers[0].values
    assert len(values) > 1
    before = noisy_class()(Halving)
    assert all(torch.equal(value, before.get_parameter(name)) for name, value in found.weights[3].items())
    assert run.precision_plugin.scaler.get_scale() == 128.0


def test_a_window_without_a_loss() -> None:
    class Nothing(noisy_class()):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx > 3 else None

    run, _ = fit(Nothing(Halving), accumulate_grad_batches=4)
    assert len(run.optimizers[0].values) == 1


class OwnClipping(noisy_class()):  # type: ignore[misc]
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, in fact."""


@pytest.mark.parametrize(
    ("make", "model", "strategy", "options", "message"),
    [
        (ours, noisy_class(), {}, {"gradient_clip_val": 0.5}, "LBFGS with gradient_clip_val=0.5.*valid: no clipping"),
        (torchs, OwnClipping, {}, {}, "LBFGS with a configure_gradient_clipping of the module's own.*valid"),
        (torchs, noisy_class(), {}, {"plugins": [scaled()]}, "torch's LBFGS with precision.*valid: lightning_optim.LB"),
        (ours, noisy_class(), {"capture": True}, {}, "LBFGS with capture=True.*valid: capture=False"),
        (torchs, noisy_class(), {"step_in_backward": True}, {}, "LBFGS with step_in_backward=True.*valid"),
    ],
)
def test_what_is_refused(make: Any, model: Any, strategy: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(model(make), InGraphStrategy(**strategy), **options)
