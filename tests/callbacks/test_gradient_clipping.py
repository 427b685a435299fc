"""``GradientClipping`` under Lightning's Trainer against plain loops; what Lightning's own clipping does wrong."""

from __future__ import annotations

import copy
import math
import pickle
from contextlib import nullcontext
from functools import cache, partial
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace
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
    known_warnings,
    make_trainer,
    model_class,
    network,
    scaled,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_optim
from lightning_optim.callbacks import GradientClipping
from lightning_optim.control.clipping import AGC, AdaGC, NonfiniteGradientError
from lightning_optim.control.clipping.conflicts import optimizer_conflict
from lightning_optim.strategies import DetachedStrategy, InGraphStrategy

pytestmark = [
    *known_warnings,
    pytest.mark.usefixtures("one_thread"),
    # Of steps that a loss scaler skips, under Lightning's own strategies.
    pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step"),
]

STRATEGIES = ["auto", "in_graph", "detached", "optim_auto"]
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]
EACH_WAY = pytest.mark.parametrize("way", WAYS)
EACH_STRATEGY = pytest.mark.parametrize("strategy", STRATEGIES)


class Manual(Model):
    """Steps by itself, after every ``accumulate`` batches."""

    def __init__(self, make: Any = None, accumulate: int = 1, clip: float = 0.0) -> None:
        super().__init__(make)
        self.automatic_optimization, self.accumulate, self.clip = False, accumulate, clip

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx) / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            optimizer = self.optimizers()
            if self.clip:
                self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


class Noted:
    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.lrs: list[float] = []


@cache
def by_hand(way: str, precision: str = "32-true", accumulate: int = 1, name: str = "torch AdamW") -> Noted:
    """The training of ``Model`` in plain PyTorch; weights and learning rates after every batch."""
    net, noted = network(), Noted()
    optimizer = OPTIMIZERS[name](net.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "16-mixed")
    clip = WAYS[way][1]()
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.half}.get(precision)
    for number, (x, y) in enumerate(DataLoader(dataset(), batch_size=2)):
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            loss = nn.functional.mse_loss(net(x).to(y.dtype), y)
        scaler.scale(loss / accumulate).backward()
        if (number + 1) % accumulate == 0:
            scaler.unscale_(optimizer)
            clip(list(net.parameters()))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()
        noted.weights.append({f"net.{key}": p.detach().clone() for key, p in net.named_parameters()})
        noted.lrs.append(optimizer.param_groups[0]["lr"])
    return noted


def clipping(way: str, **options: Any) -> Any:
    return GradientClipping(**WAYS[way][0], **options)


def in_precision(precision: str) -> dict[str, Any]:
    return {"plugins": [scaled()]} if precision == "16-mixed" else {"precision": precision}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_optim.warnings._seen", set())


# ---------------------------------------------------------------- the same as a plain loop


def _stands_for_others(way: str, strategy: str, precision: str, accumulate: int, automatic: bool) -> bool:
    """Whether a case is run always: each pair of settings is in some."""
    numbers = (STRATEGIES.index(strategy), PRECISIONS.index(precision), accumulate, automatic)
    return way in ("max_norm", "adagc") and (accumulate == 2 or not automatic or sum(numbers) % 2 == 0)


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


# ---------------------------------------------------------------- what Lightning's own clipping does wrong


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

    class Overflowing(model):  # type: ignore[misc]
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
                p -= 0.05 * p.grad  # type: ignore[operator]

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


# ---------------------------------------------------------------- what is refused


class Clipper(Model):
    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        pass


REFUSED: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "the Trainer clips": (
        Model,
        {"gradient_clip_val": 0.5},
        {},
        r"Trainer\(gradient_clip_val=0.5\): gradients would be",
    ),
    "the module clips": (Clipper, {}, {}, r"a configure_gradient_clipping of the module's own: gradients would be"),
    "the optimizer clips": (
        partial(Model, partial(lightning_optim.AdamW, max_grad_norm=1.5)),
        {},
        {},
        r"AdamW\(max_grad_norm=1.5\): gradients would be clipped twice; valid: one of them",
    ),
    "an optimizer in SAM clips": (
        partial(Model, partial(lightning_optim.SAM, base=partial(lightning_optim.AdamW, max_grad_norm=1.5))),
        {"strategy": "in_graph"},
        {},
        r"AdamW\(max_grad_norm=1.5\): gradients would be clipped twice",
    ),
    "L-BFGS": (
        partial(Model, lightning_optim.LBFGS),
        {"strategy": "in_graph"},
        {},
        "LBFGS: along a clipped gradient its line search compares.*valid: no clipping, or another optimizer",
    ),
    "torch's L-BFGS": (partial(Model, torch.optim.LBFGS), {}, {}, "LBFGS: along a clipped gradient"),
    "SAM under Lightning's own": (
        partial(Model, partial(lightning_optim.SAM, base=partial(torch.optim.SGD, lr=0.1))),
        {},
        {"agc": 0.01},
        r"SAM under SingleDeviceStrategy, where the gradient of its ascent would be clipped too; valid: max_norm=",
    ),
    "step in backward": (
        partial(Model, OPTIMIZERS["ours"]),
        {"strategy": partial(InGraphStrategy, step_in_backward="per_tensor")},
        {},
        r"step_in_backward='per_tensor', which steps weights before all gradients are there; valid: step_in_backward=",
    ),
    "updates that cannot wait": (
        partial(Model, OPTIMIZERS["ours"]),
        {"strategy": partial(DetachedStrategy, clip="none")},
        {},
        r"the strategy's clip='none', which steps weights before the norm is known; valid: clip='exact'",
    ),
    "no such name": (Model, {}, {"agc": AGC(exclude=["head.*"])}, r"exclude='head.\*' is the name of no parameter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_when_a_fit_starts(case: str) -> None:
    model, trainer, options, message = REFUSED[case]
    strategy, others = trainer.get("strategy", "auto"), {k: v for k, v in trainer.items() if k != "strategy"}
    callback = GradientClipping(**options or {"max_norm": 0.5})
    with pytest.raises(ValueError, match=message):
        fit(model(), strategy if isinstance(strategy, str) else strategy(), callbacks=[callback], **others)


class FSDPStrategy:
    """A name and what is asked of it; the real ones need an accelerator, or DeepSpeed."""

    model = step_in_backward = None


class DeepSpeedStrategy(FSDPStrategy):
    pass


def test_strategies_that_are_refused() -> None:
    def trainer(strategy: Any) -> Any:
        trainer: Any = make_trainer()
        trainer.strategy._lightning_module = module
        trainer.strategy.optimizers = [optimizer]
        trainer._accelerator_connector.strategy = strategy
        return trainer

    module = Model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"FSDPStrategy \(FSDP1\), in whose flat parameters neither.*valid: max_norm"):
        GradientClipping(agc=0.01).setup(trainer(FSDPStrategy()), module, "fit")
    with pytest.raises(ValueError, match=r"DeepSpeed keeps the gradients to itself; valid: Trainer\(gradient_clip_val"):
        GradientClipping(max_norm=1.0).setup(trainer(DeepSpeedStrategy()), module, "fit")
    conflict = partial(optimizer_conflict, optimizer=optimizer, clipping=GradientClipping(max_norm=1.0))
    parts = SimpleNamespace(strategy=FSDPStrategy(), optimizers=[optimizer], lightning_module=module)
    assert "a module that wraps parts of itself" in str(conflict(parts))
    whole = FSDPStrategy()
    whole.model = type("Wrapped", (), {"clip_grad_norm_": None})()
    two = SimpleNamespace(strategy=whole, optimizers=[optimizer, optimizer], lightning_module=module)
    assert "FSDP1 and 2 optimizers" in str(conflict(two))


def test_bad_options_and_two_of_them() -> None:
    with pytest.raises(ValueError, match="GradientClipping: none of them; valid: exactly one of max_norm, max_value"):
        GradientClipping()
    with pytest.raises(ValueError, match=r"GradientClipping: max_norm=0.0; valid: a finite number > 0"):
        GradientClipping(max_norm=0.0)
    with pytest.raises(ValueError, match=r"GradientClipping: log=1 is not a bool"):
        GradientClipping(max_norm=1.0, log=1)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `GradientClipping`"):
        make_trainer(callbacks=[GradientClipping(max_norm=1.0), GradientClipping(max_norm=2.0)])


# ---------------------------------------------------------------- from the command line

FLAGS: list[tuple[list[str], dict[str, Any]]] = [
    (["--trainer.callbacks.max_norm=0.5", "--trainer.callbacks.log=true"], {"max_norm": 0.5, "_logs": True}),
    (["--trainer.callbacks.agc=0.02"], {"agc": AGC(0.02)}),
    (
        ['--trainer.callbacks.agc={"clip_factor": 0.02, "exclude": ["net.3.*"]}'],
        {"agc": AGC(0.02, exclude=["net.3.*"])},
    ),
    (["--trainer.callbacks.adagc=1.1"], {"adagc": AdaGC(1.1)}),
    (['--trainer.callbacks.adagc={"warmup_steps": 5}'], {"adagc": AdaGC(warmup_steps=5)}),
]


@pytest.mark.parametrize(("flags", "expected"), FLAGS)
def test_flags(flags: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    callback = _from_command_line(["--trainer.callbacks+=GradientClipping", *flags], monkeypatch)
    assert {name: getattr(callback, name) for name in expected} == expected


def test_yaml_and_wrong_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
trainer:
  callbacks:
    - class_path: lightning_optim.callbacks.GradientClipping
      init_args:
        adagc:
          ratio: 1.2
          warmup_steps: 3
        error_if_nonfinite: true
"""
    (tmp_path / "run.yaml").write_text(text)
    callback = _from_command_line(["--config", str(tmp_path / "run.yaml")], monkeypatch)
    assert callback.adagc == AdaGC(1.2, warmup_steps=3)
    assert callback.error_if_nonfinite
    for flag, said in (("max_norm=big", "max_norm"), ("clip=1", "clip"), ('agc={"factor": 1}', "agc")):
        with pytest.raises(SystemExit):
            _from_command_line(["--trainer.callbacks+=GradientClipping", f"--trainer.callbacks.{flag}"], monkeypatch)
        assert said in capsys.readouterr().err


def _from_command_line(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setattr("sys.argv", ["fit"])
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    cli = LightningCLI(Model, args=[*quiet, *arguments], run=False, save_config_callback=None)
    return next(one for one in cli.trainer.callbacks if isinstance(one, GradientClipping))
