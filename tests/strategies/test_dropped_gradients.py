"""Gradients that someone drops, in any hook, are dropped: as in Lightning's own strategies, and in a window that is
evaluated again as in a loop that is written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from foreign import Foreign
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_optim
import lightning_optim.strategies

from .common import CLOSE, Model, assert_same_steps, dataset, fit, known_warnings, network, scaled

pytestmark = [
    *known_warnings,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradients were written to between a backward pass"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.. before .optimizer.step"),
]

#: How they are dropped.
Drop = Callable[[nn.Module], None]
HOWS: dict[str, Drop] = {
    "none": lambda net: net.zero_grad(),
    "zeros": lambda net: net.zero_grad(set_to_none=False),
    "part": lambda net: setattr(next(net.parameters()), "grad", None),
}
#: Where, and whether that is before the batch's backward pass, after it, or after it and the step, if there is one.
HOOKS = {
    "on_train_batch_start": "before",
    "training_step": "before",
    "on_before_backward": "before",
    "on_after_backward": "after",
    "on_train_batch_end": "between",
    "on_validation_start": "between",
}
#: Of these batches, in windows of three (the last of which is of two).
BATCHES = {2, 3, 6}


class Dropping(Model):
    """Drops gradients in a hook, at some of eight batches."""

    def __init__(self, make: Any, hook: str, how: str, at: set[int] = BATCHES) -> None:
        super().__init__(make)
        self.how, self.at, self.hook, self.evaluated = how, at, hook, 0
        if hook != "training_step":
            setattr(self, hook, self.drop)

    def drop(self, *_: Any, **__: Any) -> None:
        if self.trainer.fit_loop.epoch_loop.batch_idx in self.at:
            HOWS[self.how](self.net)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.evaluated += 1
        if self.hook == "training_step" and batch_idx in self.at:
            HOWS[self.how](self.net)
        return super().training_step(batch, batch_idx)

    def validation_step(self, *_: Any) -> None:
        """Only for its hooks, in the middle of windows."""

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(dataset(2), batch_size=2)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


SETTINGS: dict[str, Any] = {"val_check_interval": 1, "num_sanity_val_steps": 0}
adamw = partial(lightning_optim.AdamW, lr=0.03)
#: Steps by itself under our strategies.
foreign = partial(Foreign, lr=0.01)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    ("hook", "accumulate"), [("on_after_backward", 1), ("on_before_optimizer_step", 3), ("on_validation_start", 3)]
)
def test_as_without_a_strategy_of_ours(hook: str, how: str, accumulate: int) -> None:
    runs = [
        fit(Dropping(adamw, hook, how), strategy, accumulate_grad_batches=accumulate, **SETTINGS)
        for strategy in ("in_graph", "auto")
    ]
    assert_same_steps(runs[0][1], runs[1][1])


@pytest.mark.parametrize("make", [adamw, foreign])
@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "configure_gradient_clipping"])
def test_after_they_were_unscaled(hook: str, make: Any) -> None:
    """The flags of the gradients that were dropped count for the scale."""

    class Guarding(Dropping):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx in self.at else 1.0)

    runs = [fit(Guarding(make, hook, "none"), strategy, plugins=[scaled()]) for strategy in ("in_graph", "auto")]
    assert_same_steps(runs[0][1], runs[1][1])
    scales = [run.precision_plugin.scaler.get_scale() for run, _ in runs]
    assert scales == [32.0, 32.0]


@pytest.mark.parametrize("make", [adamw, foreign, partial(lightning_optim.SAM, base=adamw)])
@pytest.mark.parametrize("strategy", ["in_graph", "detached"])
def test_before_they_were_unscaled(strategy: str, make: Any) -> None:
    """No step is made, and the scale stays what it is; Lightning's own strategies end in torch's AssertionError."""
    run, found = fit(Dropping(make, "on_after_backward", "none"), strategy, plugins=[scaled(growth_interval=5)])
    moved = [any(not torch.equal(a[key], b[key]) for key in a) for a, b in pairwise(found.weights)]
    assert moved == [batch not in BATCHES for batch in range(1, 8)]
    state = run.precision_plugin.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (512.0, 0)  # five steps


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_gradient_is_dropped(accumulate: int) -> None:
    model = Dropping(adamw, "on_after_backward", "none", at=set(range(8)))
    run, found = fit(model, plugins=[scaled()], accumulate_grad_batches=accumulate)
    assert all(torch.equal(p, q) for p, q in zip(network().parameters(), model.net.parameters(), strict=True))
    assert run.precision_plugin.scaler.get_scale() == 256.0
    assert len(found.weights) == 8


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_after_clipping_was_asked_for(how: str, precision: str) -> None:
    """The norm that the rest is clipped by is of all gradients, as when they were clipped at once."""

    class Clipping(Dropping):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            self.drop()

    def run(strategy: str) -> Any:
        plugins = {"plugins": [scaled()]} if precision == "16-mixed" else {}
        return fit(Clipping(adamw, "on_fit_start", how), strategy, **plugins)[1]

    assert_same_steps(run("in_graph"), run("auto"))


# -- windows that are evaluated again -------------------------------------------------------------------------------


class InALoop:
    """Training with a closure over windows, in which gradients are dropped where the hook drops them."""

    def __init__(self, make: Any, where: str, how: str, accumulate: int) -> None:
        self.net, self.where, self.drop, self.accumulate = network(), where, HOWS[how], accumulate
        self.optimizer = make(self.net.parameters())
        self.weights: list[dict[str, Tensor]] = []

    def windows(self) -> Iterator[range]:
        for at in range(0, 8, self.accumulate):
            yield range(at, min(at + self.accumulate, 8))

    def evaluate(self, window: range) -> Tensor:
        x, y = dataset().tensors
        self.net.zero_grad()
        total = torch.zeros(())
        for batch in window:
            if self.where == "before" and batch in BATCHES and batch != window[0]:
                self.drop(self.net)
                total = total * (self.drop is HOWS["part"])
            part = slice(2 * batch, 2 * batch + 2)
            loss = nn.functional.mse_loss(self.net(x[part]), y[part]) / self.accumulate
            loss.backward()
            total = total + loss.detach()
            if batch in BATCHES and (self.where == "after" or (self.where == "between" and batch != window[-1])):
                self.drop(self.net)
                total = total * (self.drop is HOWS["part"])
        return total

    def has_gradients(self) -> bool:
        return any(p.grad is not None for p in self.net.parameters())

    def fit(self) -> InALoop:
        for window in self.windows():
            before = {f"net.{name}": p.detach().clone() for name, p in self.net.named_parameters()}
            self.weights += [before] * (len(window) - 1)
            self.evaluate(window)
            if self.has_gradients():
                self.step(window)
            self.weights.append({f"net.{name}": p.detach().clone() for name, p in self.net.named_parameters()})
        return self

    def step(self, window: range) -> None:
        self.optimizer.step(lambda: self.evaluate(window))


class InALoopWithSAM(InALoop):
    def step(self, window: range) -> None:
        self.optimizer.perturb()
        self.evaluate(window)
        self.optimizer.restore()
        self.optimizer.step()


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("hook", "accumulate"), [*((hook, 3) for hook in HOOKS), ("on_after_backward", 1)])
def test_sam(hook: str, how: str, accumulate: int) -> None:
    make = partial(lightning_optim.SAM, base=adamw, rho=0.5)
    _, found = fit(Dropping(make, hook, how), accumulate_grad_batches=accumulate, **SETTINGS)
    assert_weights(found, InALoopWithSAM(make, HOOKS[hook], how, accumulate).fit())


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("hook", "accumulate"), [("on_before_backward", 3), ("on_after_backward", 3)])
def test_lbfgs(hook: str, how: str, accumulate: int) -> None:
    make = partial(lightning_optim.LBFGS, history_size=3)
    _, found = fit(Dropping(make, hook, how), accumulate_grad_batches=accumulate, **SETTINGS)
    assert_weights(found, InALoop(make, HOOKS[hook], how, accumulate).fit())


@pytest.mark.parametrize("make", [partial(lightning_optim.LBFGS), partial(torch.optim.LBFGS, max_iter=3)])
def test_lbfgs_before_the_step(make: Any) -> None:
    """After the hooks of the first evaluation: there is no step, and the closure is not called again."""
    model = Dropping(make, "on_before_optimizer_step", "none", at=set(range(8)))
    fit(model)
    assert all(torch.equal(p, q) for p, q in zip(network().parameters(), model.net.parameters(), strict=True))
    assert model.evaluated == 8


def test_a_guard_against_nan_with_sam() -> None:
    """A loss that is NaN in both passes: nothing is left of it, in whatever way gradients are dropped."""

    class Guarding(Dropping):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx in self.at else 1.0)

    for how in ("none", "zeros"):
        model = Guarding(partial(lightning_optim.SAM, base=adamw), "on_after_backward", how)
        fit(model)
        assert all(p.isfinite().all() for p in model.parameters())


def test_what_is_done_to_gradients_otherwise_is_said() -> None:
    class Scaling(Dropping):
        def on_after_backward(self) -> None:
            for p in self.parameters():
                p.grad.mul_(0.5)

    with pytest.warns(UserWarning, match="on_after_backward, say.: further evaluations of SAM do not do so again"):
        fit(Scaling(partial(lightning_optim.SAM, base=adamw), "on_fit_start", "none"))


@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize(
    ("strategy", "make"),
    [
        ("in_graph", adamw),
        ("detached", adamw),
        ("detached", foreign),
        ("detached_undo", adamw),
        ("in_graph", partial(lightning_optim.SAM, base=adamw)),
        ("detached", partial(lightning_optim.SAM, base=adamw)),
        ("in_graph", partial(lightning_optim.LBFGS, lr=0.1)),
    ],
)
def test_statistics_of_averaged_weights(strategy: Any, make: Any, precision: str, validates: bool) -> None:
    """SWA's last epoch has no backward passes: the weights stay the average, and only batch norms are renewed.

    (Lightning's own strategies make a step there, with gradients that are left, or end in an AssertionError.)
    """
    if strategy == "detached_undo":
        strategy = lightning_optim.strategies.DetachedStrategy(undo=True)

    class Norm(Model):
        def __init__(self) -> None:
            super().__init__(make, 4)
            self.net = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 1))

        def configure_optimizers(self) -> Any:
            return self.make(self.parameters())

        def validation_step(self, *_: Any) -> None:
            pass

        def val_dataloader(self) -> Any:
            return DataLoader(dataset(2), batch_size=2) if validates else []

    swa = StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2, annealing_epochs=2)
    model, plugins = Norm(), {"plugins": [scaled()]} if precision == "16-mixed" else {}
    fit(model, strategy, max_epochs=3, callbacks=[swa], **plugins)
    assert swa._average_model is not None
    for p, average in zip(model.parameters(), swa._average_model.parameters(), strict=True):
        assert torch.equal(p, average)


def assert_weights(found: Any, expected: InALoop) -> None:
    assert len(found.weights) == len(expected.weights)
    for batch, (ours, theirs) in enumerate(zip(found.weights, expected.weights, strict=True)):
        for name, value in ours.items():
            message = f"batch {batch}, {name}: {value} instead of {theirs[name]}"
            torch.testing.assert_close(value, theirs[name], **CLOSE, msg=message)
