"""``LRFinder`` under a Trainer: the training after a range test is, bit for bit, the one without it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner.lr_finder import _LRFinder
from strategies.common import (
    EXACT,
    OPTIMIZERS,
    ROOTS,
    Model,
    assert_same_steps,
    known_warnings,
    make_trainer,
    model_class,
    scaled,
)
from torch import nn
from torch.utils.data import DataLoader

import lightning_optim
import lightning_optim.strategies
from lightning_optim.callbacks import LRFinder
from lightning_optim.callbacks.roots import callback_class
from lightning_optim.control.lr_finder import RangeTest
from lightning_optim.optimizers.sam import SAM
from lightning_optim.strategies import DetachedStrategy, InGraphStrategy
from lightning_optim.warnings import LightningOptimWarning

from .range_tests import QUICK, Restless, assert_identical, data, left_behind, run

pytestmark = known_warnings

STRATEGIES: dict[str, Any] = {
    "auto": lambda: "auto",
    "in_graph": lambda: "in_graph",
    "in_graph, in backward": lambda: InGraphStrategy(step_in_backward=True),
    "in_graph, previous norm": lambda: InGraphStrategy(step_in_backward="previous_norm"),
    "detached": lambda: "detached",
    "detached, speculative": lambda: DetachedStrategy(clip="speculative", bucket_mb=0.0001),
    "detached, none": lambda: DetachedStrategy(clip="none"),
    "detached, forward": lambda: DetachedStrategy(wait="forward", bucket_mb=0.0001),
    "optim_auto": lambda: "optim_auto",
    "undo": lambda: InGraphStrategy(undo=True),
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip and accumulate": {"gradient_clip_val": 0.5, "accumulate_grad_batches": 4},
    "clip": {"gradient_clip_val": 0.5},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-mixed": {"scaled": {"init_scale": 2.0**40, "growth_interval": 2}},  # its first steps are left out
}
MAKES: dict[str, Any] = {
    "torch": partial(torch.optim.AdamW, lr=0.01),
    "tensor": lambda params: lightning_optim.AdamW(
        [{**group, "lr": torch.tensor(group.get("lr", 0.01))} for group in params], lr=torch.tensor(0.01)
    ),
    "SAM": lambda params: SAM(params, lambda inner: lightning_optim.AdamW(inner, lr=0.01)),
    "Adafactor": partial(lightning_optim.Adafactor, lr=0.01),
}


def _plain(root: str) -> Any:
    class Model(model_class(root)):  # type: ignore[misc]
        """Two groups, in the same order always."""

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(data(), batch_size=3)

        def configure_optimizers(self) -> Any:
            first, *others = self.net.parameters()
            return torch.optim.SGD([{"params": others, "lr": 0.2}, {"params": [first]}], lr=0.05, momentum=0.9)

    return Model


Plain = {root: _plain(root) for root in ROOTS}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


def compare(strategy: str, case: str = "plain", make: Any = None, finder: Any = None, **loader: Any) -> LRFinder:
    """Two runs, of which one has a range test at each of its two epochs."""

    def once(finder: LRFinder | None) -> Any:
        options = dict(CASES[case])
        if (scale := options.pop("scaled", None)) is not None:
            options["plugins"] = [scaled(**scale)]
        trainer, noted = run(Restless(make, **loader), STRATEGIES[strategy](), finder, max_epochs=2, **options)
        return left_behind(trainer, noted)

    finder = finder or LRFinder(apply=False, at_epochs=[0, 1], **QUICK)
    found = once(finder)
    assert finder.test is not None
    assert len(finder.test.lrs) >= 2
    assert_identical(found, once(None))
    return finder


@pytest.mark.parametrize(
    ("strategy", "case"),
    [
        *((strategy, case) for strategy in ("auto", "in_graph", "detached") for case in CASES if case != "clip"),
        *((strategy, "clip and accumulate") for strategy in ("detached, speculative", "detached, forward", "undo")),
        *((strategy, "plain") for strategy in ("in_graph, in backward", "detached, none", "optim_auto")),
        ("in_graph, previous norm", "clip"),
    ],
)
def test_the_training_after_it_is_the_one_without_it(strategy: str, case: str) -> None:
    compare(strategy, case)


@pytest.mark.parametrize("strategy", ["in_graph", "detached"])
@pytest.mark.parametrize("make", MAKES)
def test_whatever_the_optimizer(make: str, strategy: str) -> None:
    compare(strategy, make=MAKES[make])


@pytest.mark.parametrize("root", ROOTS)
def test_losses_are_those_of_a_plain_loop(root: str) -> None:
    """Each point is the loss before the step with its learning rate, the mean over the accumulation window."""
    finder = callback_class("LRFinder", root)(apply=False, divergence=None, at_epochs=[1], **QUICK)
    model = Plain[root]()
    trainer = make_trainer(root, callbacks=[finder], accumulate_grad_batches=2, max_epochs=2)
    trainer.fit(model)
    reference = Plain["lightning.pytorch"]()
    optimizer = reference.configure_optimizers()
    batches = list(reference.train_dataloader())
    windows = [batches[start : start + 2] for start in range(0, len(batches), 2)]
    losses: list[float] = []

    def step(window: list[Any]) -> float:
        optimizer.zero_grad()
        loss = torch.stack([nn.functional.mse_loss(reference.net(x), y) for x, y in window]).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    for window in windows:  # epoch 0
        step(window)
    for number, lr in enumerate(finder.lr_range):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, lr / 4
        losses.append(step(windows[number % len(windows)]))
    assert finder.test.losses == pytest.approx(losses, rel=1e-6)
    assert finder.test.reference == 0.2


# ---------------------------------------------------------------- what is applied

SCHEDULES: dict[str, Any] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step / 10)),
    "warmup from 0": lambda o: lightning_optim.WSD(o, warmup_steps=3, total_steps=12),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [g["lr"] for g in o.param_groups], 12),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12, eta_min=0.0),
}


def applied(monkeypatch: pytest.MonkeyPatch, lr: float | None) -> None:
    """Have every range test suggest this."""
    monkeypatch.setattr(RangeTest, "suggestion", lr)


@pytest.mark.parametrize(
    ("schedule", "strategy"),
    [*((schedule, "auto") for schedule in SCHEDULES), ("lambda", "in_graph"), ("lambda", "detached")],
)
def test_the_run_goes_on_as_if_made_with_the_suggestion(
    schedule: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied(monkeypatch, 0.04)
    model, expected = Restless(), Restless(lambda groups: lightning_optim.AdamW(_times(groups, 4), lr=0.04))
    model.schedule = expected.schedule = SCHEDULES[schedule]
    _, found = run(model, strategy, LRFinder(**QUICK), max_epochs=2)
    _, wanted = run(expected, strategy, max_epochs=2)
    assert found.lrs == pytest.approx(wanted.lrs, rel=1e-12)
    found.lrs = wanted.lrs
    assert_same_steps(found, wanted)


def _times(groups: list[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    return [{**group, **({"lr": group["lr"] * factor} if "lr" in group else {})} for group in groups]


def test_stock_is_undone_by_the_schedule_flattens_groups_and_wants_an_attribute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stock = LearningRateFinder(num_training_steps=10, min_lr=1e-4, max_lr=1.0)
    with pytest.raises(AttributeError, match="should have one of these fields"):  # PL#21030, PL#16787
        run(Restless(), callbacks=[stock])
    monkeypatch.setattr(_LRFinder, "suggestion", lambda self: 0.04)
    model = Restless()
    model.lr = 0.01
    trainer, noted = run(model, callbacks=[stock])
    assert noted.lrs[-1] == pytest.approx(0.01 / (1 + len(noted.lrs) / 10)), "the schedule has undone the suggestion"
    applied(monkeypatch, 0.04)
    trainer, noted = run(Restless(), "auto", LRFinder(**QUICK))
    assert noted.lrs[-1] == pytest.approx(0.04 / (1 + len(noted.lrs) / 10))
    one, other = (group["lr"] for group in trainer.optimizers[0].param_groups)
    assert one / other == pytest.approx(5.0), "the ratio of the groups is kept"


def test_stock_changes_the_training_that_follows() -> None:
    """Also where its suggestion is not taken: what is in no checkpoint is not put back."""
    stock = LearningRateFinder(num_training_steps=10, min_lr=1e-4, max_lr=1.0, update_attr=False)
    expected = left_behind(*run(Restless()))
    found = left_behind(*run(Restless(), callbacks=[stock]))
    assert found["attributes"][0] > expected["attributes"][0], "the module's own counter"
    assert_identical(left_behind(*run(Restless(), "auto", LRFinder(apply=False, **QUICK))), expected)


def test_without_a_sound_suggestion_the_learning_rate_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = LRFinder(min_lr=1e-9, max_lr=1e-8, steps=10)
    with pytest.warns(
        LightningOptimWarning, match="no learning rate is suggested, and it stays at 0.01: the loss does"
    ):
        found = left_behind(*run(Restless(), "auto", finder))
    assert finder.suggestion is None
    assert_identical(found, left_behind(*run(Restless())))


def test_in_later_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """PL#4846: at any epoch, and at several."""
    applied(monkeypatch, 0.02)
    finder = LRFinder(at_epochs=[1, 2], **QUICK)
    model = Restless()
    model.schedule = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0)
    _, noted = run(model, "auto", finder, max_epochs=3)
    assert noted.lrs == [0.01] * 6 + [0.02] * 12
    assert finder.state_dict()["tested"] == [1, 2]


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    applied(monkeypatch, 0.02)
    path = tmp_path / "run.ckpt"
    make = OPTIMIZERS["ours"]
    _, straight = run(Model(make), "in_graph", LRFinder(**QUICK), max_epochs=2)
    run(Model(make), "in_graph", LRFinder(**QUICK), max_epochs=1)[0].save_checkpoint(path)
    finder = LRFinder(**QUICK)
    _, resumed = run(Model(make), "in_graph", finder, max_epochs=2, ckpt_path=path)
    straight.weights, straight.lrs = straight.weights[8:], straight.lrs[8:]
    assert_same_steps(resumed, straight, **EXACT)
    assert finder.state_dict()["tested"] == [0], "it knows of the test, and makes no second one"
    assert finder.test is not None
