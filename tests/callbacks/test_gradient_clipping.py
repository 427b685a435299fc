"""``GradientClipping`` under Lightning's Trainer against plain loops."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from control.clipping_references import WAYS
from foreign import Foreign
from strategies.common import (
    EXACT,
    OPTIMIZERS,
    ROOTS,
    Model,
    assert_same_steps,
    dataset,
    fit,
    make_trainer,
    model_class,
    network,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_optim
from lightning_optim.callbacks import GradientClipping
from lightning_optim.strategies import DetachedStrategy

from .clipped import (
    EACH_STRATEGY,
    EACH_WAY,
    PRECISIONS,
    STRATEGIES,
    Manual,
    Noted,
    by_hand,
    clipping,
    in_precision,
    known_warnings,
)

pytestmark = [*known_warnings, pytest.mark.usefixtures("one_thread")]

# ---------------------------------------------------------------- the same as a plain loop


def _stands_for_others(way: str, strategy: str, precision: str, accumulate: int, automatic: bool) -> bool:
    """Whether a case is run always: each pair of settings is in some."""
    numbers = (STRATEGIES.index(strategy), PRECISIONS.index(precision), accumulate, automatic)
    chosen = accumulate == 2 or not automatic or sum(numbers) % 2 == 0
    return chosen if way in ("max_norm", "adagc") else (accumulate, automatic, precision) == (2, True, "16-mixed")


@pytest.mark.matrix(unless=_stands_for_others)
@pytest.mark.parametrize(("automatic", "accumulate"), list(product([True, False], [1, 2])))
@pytest.mark.parametrize("precision", PRECISIONS)
@EACH_STRATEGY
@EACH_WAY
def test_the_same_as_a_plain_loop(way: str, strategy: str, precision: str, accumulate: int, automatic: bool) -> None:
    options = in_precision(precision) | {"callbacks": [clipping(way)]}
    if automatic:
        _, found = fit(Model(), strategy, accumulate_grad_batches=accumulate, **options)
    else:
        _, found = fit(Manual(accumulate=accumulate), strategy, **options)
    # float32 by both, in another order of operations; half precision rounds gradients alike.
    assert_same_steps(found, by_hand(way, precision, accumulate))


@pytest.mark.parametrize("name", ["ours", "torch SGD", "foreign"])
@EACH_STRATEGY
def test_other_optimizers(name: str, strategy: str) -> None:
    _, found = fit(Model(OPTIMIZERS[name]), strategy, callbacks=[clipping("max_norm")])
    assert_same_steps(found, by_hand("max_norm", name=name))


@pytest.mark.parametrize("root", ROOTS)
def test_either_root(root: str) -> None:
    cls = import_module(
        "lightning_optim.callbacks" if root.startswith("lightning.") else "lightning_optim.callbacks._pytorch_lightning"
    ).GradientClipping
    for strategy in ("auto", "in_graph"):
        _, found = fit(model_class(root)(), strategy, callbacks=[cls(adagc=WAYS["adagc"][0]["adagc"])])
        assert_same_steps(found, by_hand("adagc"))


# ---------------------------------------------------------------- in the step


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", [Model, Manual])
@pytest.mark.parametrize("strategy", ["in_graph", "detached", "optim_auto"])
def test_a_global_norm_is_clipped_inside_of_the_step(
    strategy: str, model: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No gradient is touched; the result is, bit for bit, that of ``gradient_clip_val``."""

    def outside(*_: Any, **__: Any) -> None:
        raise AssertionError("a pass over the gradients")

    monkeypatch.setattr("lightning_optim.control.clipping.clipper.GradientClipper.clip", outside)
    run, found = fit(model(), strategy, callbacks=[clipping("max_norm")], **in_precision(precision))
    assert "eager" not in run.strategy.report()
    _, expected = fit(Model(), strategy, gradient_clip_val=0.5, **in_precision(precision))
    assert_same_steps(found, expected, **EXACT)


def test_gradients_leave_early_and_speculation_has_the_norm() -> None:
    """With ``clip="speculative"`` updates run in the backward pass; whoever looked at gradients would stop that."""
    for limit in (0.5, 1e4):
        strategy = DetachedStrategy(clip="speculative")
        run, found = fit(Model(), strategy, callbacks=[GradientClipping(max_norm=limit)])
        _, expected = fit(Model(), DetachedStrategy(clip="speculative"), gradient_clip_val=limit)
        assert_same_steps(found, expected, **EXACT)
        assert "speculative" in run.strategy.report()


def test_an_optimizer_that_runs_its_own_step_is_clipped_before_it() -> None:
    seen: list[float] = []

    class Looks(Foreign):
        def step(self, closure: Any = None) -> Any:
            result = closure() if closure is not None else None
            seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.param_groups[0]["params"]])))
            super().step()
            return result

    fit(Model(partial(Looks, lr=0.01)), "in_graph", callbacks=[clipping("max_norm")])
    assert seen == pytest.approx([0.5] * 8, rel=1e-5)


@EACH_STRATEGY
def test_sam_has_its_last_gradient_clipped(strategy: str) -> None:
    make = partial(lightning_optim.SAM, base=partial(torch.optim.SGD, lr=0.05), rho=0.1)
    net = network()
    optimizer: Any = make(net.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    expected = Noted()
    way = "max_norm" if strategy == "auto" else "agc"
    clip = WAYS[way][1]()
    for x, y in DataLoader(dataset(), batch_size=2):
        for perturbed in (False, True):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            if not perturbed:
                optimizer.perturb()
        optimizer.restore()
        clip(list(net.parameters()))
        optimizer.step()
        schedule.step()
        expected.weights.append({f"net.{key}": p.detach().clone() for key, p in net.named_parameters()})
        expected.lrs.append(optimizer.param_groups[0]["lr"])
    _, found = fit(Model(make), strategy, callbacks=[clipping(way)])
    assert_same_steps(found, expected)


# ---------------------------------------------------------------- several optimizers, resuming, copies


class Two(Model):
    """Two optimizers, of which the second steps at every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.05) for layer in (self.net[0], self.net[3])]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad(), second.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        first.step()
        if batch_idx % 2:
            second.step()


@pytest.mark.parametrize("strategy", ["auto", "in_graph", "detached"])
@EACH_WAY
def test_several_optimizers_are_clipped_each_by_itself(way: str, strategy: str) -> None:
    net = network()
    halves = [net[0], net[3]]
    optimizers = [torch.optim.SGD(half.parameters(), lr=0.05) for half in halves]
    clips = [WAYS[way][1](), WAYS[way][1]()]
    expected = Noted()
    for number, (x, y) in enumerate(DataLoader(dataset(), batch_size=2)):
        net.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        for half, optimizer, clip in list(zip(halves, optimizers, clips, strict=True))[: 1 + number % 2]:
            clip(list(half.parameters()))
            optimizer.step()
        expected.weights.append({f"net.{key}": p.detach().clone() for key, p in net.named_parameters()})
        expected.lrs.append(0.05)
    run, found = fit(Two(), strategy, callbacks=[clipping(way, log=True)], log_every_n_steps=2)
    assert_same_steps(found, expected)
    names = ("norm_before", "norm_after", "share")
    assert set(run.logged_metrics) == {f"gradient_clipping/{index}/{name}" for index in (0, 1) for name in names}


@pytest.mark.parametrize("strategy", ["auto", "detached"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_resuming_bit_for_bit(strategy: str, precision: str, tmp_path: Path) -> None:
    straight = clipping("adagc")
    _, expected = fit(Model(), strategy, max_epochs=2, callbacks=[straight], **in_precision(precision))
    run, _ = fit(Model(), strategy, callbacks=[clipping("adagc")], **in_precision(precision))
    run.save_checkpoint(tmp_path / "half.ckpt")
    again = clipping("adagc")
    path = tmp_path / "half.ckpt"
    _, found = fit(Model(), strategy, max_epochs=2, callbacks=[again], ckpt_path=path, **in_precision(precision))
    expected.weights, expected.lrs = expected.weights[8:], expected.lrs[8:]
    assert_same_steps(found, expected, **EXACT)
    assert again.state_dict() == straight.state_dict()
    # Another way of clipping has no use for averages.
    fit(Model(), strategy, max_epochs=2, callbacks=[clipping("agc")], ckpt_path=path, **in_precision(precision))


@pytest.mark.matrix(unless=lambda way, strategy: (way == "max_norm") == (strategy != "auto"))
@EACH_STRATEGY
@EACH_WAY
def test_a_second_fit_and_copies(way: str, strategy: str) -> None:
    """Also after an exception in the middle of the first."""

    class Fails(Model):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step == 3:
                raise ArithmeticError

    callback = clipping(way, log=True)
    trainer = make_trainer(strategy=strategy, callbacks=[callback], log_every_n_steps=1)
    with pytest.raises(ArithmeticError):
        trainer.fit(Fails())
    trainer = make_trainer(strategy=strategy, callbacks=[callback], log_every_n_steps=1)
    trainer.fit(Model())
    for same in (copy.deepcopy(trainer).callbacks, [pickle.loads(pickle.dumps(callback))], [callback]):  # noqa: S301
        ours = [one for one in same if isinstance(one, GradientClipping)]
        _, found = fit(Model(), strategy, callbacks=ours)
        assert_same_steps(found, by_hand(way))


# ---------------------------------------------------------------- logging


@pytest.mark.matrix(unless=lambda way, strategy: (way == "max_norm") == (strategy != "auto"))
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@EACH_STRATEGY
@EACH_WAY
def test_logging(way: str, strategy: str, precision: str) -> None:
    """At the steps that are logged, the norms of those very steps."""
    logged: list[dict[str, float]] = []

    class Logger(import_module("lightning.pytorch.loggers.logger").Logger):  # type: ignore[misc]
        name, version = "here", 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.append({**metrics, "step": float(step or 0)})

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

    net = network()
    expected: list[float] = []
    clip = WAYS[way][1]()

    def clip_and_note(params: Any) -> None:
        expected.append(float(torch.nn.utils.get_total_norm([p.grad for p in params])))
        clip(params)

    for x, y in DataLoader(dataset(), batch_size=2):
        net.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        clip_and_note(list(net.parameters()))
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(0.05 * p.grad)  # type: ignore[operator]

    sgd = partial(torch.optim.SGD, lr=0.05)

    class Constant(Model):
        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

    options = in_precision(precision) | {"logger": Logger(), "log_every_n_steps": 3}
    fit(Constant(), strategy, callbacks=[clipping(way, log=True)], **options)
    assert [row["step"] for row in logged] == [2, 5]
    tolerance = 1e-5 if precision == "32-true" else 0.02
    for row, step in zip(logged, (2, 5), strict=True):
        assert row["gradient_clipping/norm_before"] == pytest.approx(expected[step], rel=tolerance)
        assert row["gradient_clipping/norm_after"] < row["gradient_clipping/norm_before"]
        assert 0 < row["gradient_clipping/share"] <= 1
    if way == "max_norm":
        assert [row["gradient_clipping/norm_after"] for row in logged] == pytest.approx([0.5, 0.5], rel=1e-5)


def test_nothing_is_logged_unless_asked_for() -> None:
    run, _ = fit(Model(), "auto", callbacks=[clipping("max_norm")], log_every_n_steps=1)
    assert run.logged_metrics == {}
