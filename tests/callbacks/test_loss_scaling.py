"""``LossScaling`` under Lightning: against loops that are written out, and where Lightning's own scaling goes wrong."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from strategies.common import (
    CLOSE,
    EXACT,
    OPTIMIZERS,
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
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR, OneCycleLR, SequentialLR

import lightning_optim
from lightning_optim.callbacks import LossScaling
from lightning_optim.callbacks.roots import callback_class
from lightning_optim.control.loss_scale import LossScaler, TooManySkippedStepsError
from lightning_optim.strategies.scaler import InStepScaler
from lightning_optim.warnings import LightningOptimWarning

pytestmark = [*known_warnings, pytest.mark.usefixtures("one_thread")]

STRATEGIES = ["auto", "in_graph", "detached"]
#: As many as a scale that is much too large at first, and grows often, makes of eight batches.
SETTINGS: dict[str, Any] = {"init_scale": 256.0, "growth_interval": 2, "max_scale": 512.0}
OVERFLOWS = {2, 3, 6}
GradScaler = torch.amp.GradScaler
Hook = Callable[[nn.Module], None]


def half(scaler: Any = None) -> MixedPrecision:
    """``16-mixed`` on the CPU, with the scaler that the Trainer's flag gives on CUDA."""
    return MixedPrecision("16-mixed", "cpu", scaler)


def train(model: Any, strategy: Any = "auto", callback: Any = None, **options: Any) -> tuple[Any, Any]:
    """A fit with the callback."""
    callbacks = [*options.pop("callbacks", []), LossScaling(**SETTINGS) if callback is None else callback]
    return fit(model, strategy, plugins=[options.pop("plugin", None) or half()], callbacks=callbacks, **options)


class Scaled(Model):
    """Some batches overflow."""

    def __init__(self, make: Any = None) -> None:
        super().__init__(make or OPTIMIZERS["torch AdamW"])
        self.overflows = OVERFLOWS


class Noted:
    """What a loop noted, as the tests' fits do."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.lrs: list[float] = []
        self.scales: list[float] = []


def by_hand(
    make: Any, clip: float | None = None, accumulate: int = 1, after_backward: Hook | None = None, before_step: Hook | None = None
) -> Noted:
    """The loop of torch's documentation, with a schedule that waits, and with bounds."""
    net, noted = network(), Noted()
    optimizer = make(net.parameters())
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    scaler = GradScaler("cpu", init_scale=SETTINGS["init_scale"], growth_interval=SETTINGS["growth_interval"])
    x, y = dataset().tensors
    for batch in range(8):
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            part = slice(2 * batch, 2 * batch + 2)
            loss = nn.functional.mse_loss(net(x[part]).to(y.dtype), y[part])
            loss = loss * 1e30 if batch in OVERFLOWS else loss
        scaler.scale(loss / accumulate).backward()
        if after_backward is not None:
            after_backward(net)
        if (batch + 1) % accumulate == 0:
            scaler.unscale_(optimizer)
            if before_step is not None:
                before_step(net)
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= before:
                schedule.step()
            if scaler.get_scale() > SETTINGS["max_scale"]:
                scaler.update(SETTINGS["max_scale"])
            optimizer.zero_grad()
        noted.weights.append({f"net.{name}": p.detach().clone() for name, p in net.named_parameters()})
        noted.lrs.append(optimizer.param_groups[0]["lr"])
        noted.scales.append(scaler.get_scale())
    return noted


def states(run: Any) -> dict[str, Any]:
    state: dict[str, Any] = run.precision_plugin.state_dict()
    return state


# -- a whole training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["ours", "torch AdamW", "foreign"])
@pytest.mark.parametrize("options", [{}, {"clip": 0.5}, {"clip": 0.5, "accumulate": 2}], ids=str)
def test_as_a_loop_that_is_written_out(options: dict[str, Any], name: str, strategy: str) -> None:
    expected = by_hand(OPTIMIZERS[name], **options)
    flags = {"gradient_clip_val": options.get("clip"), "accumulate_grad_batches": options.get("accumulate", 1)}
    run, found = train(Scaled(OPTIMIZERS[name]), strategy, **flags)
    assert_same_steps(found, expected, **(EXACT if strategy == "auto" else CLOSE))
    assert states(run)["scale"] == expected.scales[-1]
    assert len(set(expected.scales)) > 1


class Manual(Scaled):
    """Two optimizers, the second of which overflows; schedules that the module advances."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for which, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            x, y = batch
            loss = nn.functional.mse_loss(self.net(x).to(y.dtype), y)
            self.manual_backward(loss * 1e30 if which and batch_idx in self.overflows else loss)
            optimizer.step()
            if not self.trainer.precision_plugin.scaler.step_was_skipped(optimizer.optimizer):
                self.lr_schedulers()[which].step()

    def configure_optimizers(self) -> Any:
        halves = [self.net[0].parameters(), self.net[3].parameters()]
        optimizers = [self.make(params) for params in halves]
        return optimizers, [LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in optimizers]


def manually_by_hand(make: Any) -> Noted:
    net, noted = network(), Noted()
    optimizers = [make(net[at].parameters()) for at in (0, 3)]
    schedules = [LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in optimizers]
    scaler = GradScaler("cpu", init_scale=256.0, growth_interval=2000)
    x, y = dataset().tensors
    for batch in range(8):
        part = slice(2 * batch, 2 * batch + 2)
        for which, optimizer in enumerate(optimizers):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                loss = nn.functional.mse_loss(net(x[part]).to(y.dtype), y[part])
            scaler.scale(loss * 1e30 if which and batch in OVERFLOWS else loss).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= before:
                schedules[which].step()
        noted.weights.append({f"net.{name}": p.detach().clone() for name, p in net.named_parameters()})
        noted.lrs.append(optimizers[0].param_groups[0]["lr"])
    return noted


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_manual_optimization(strategy: str) -> None:
    callback = LossScaling(init_scale=256.0)
    run, found = train(Manual(), strategy, callback)
    assert_same_steps(found, manually_by_hand(OPTIMIZERS["torch AdamW"]), **(EXACT if strategy == "auto" else CLOSE))
    assert callback.scaler is not None
    assert callback.scaler.state_dict()["skipped_steps"] == [0, 3]
    assert run.lr_scheduler_configs[1].scheduler.last_epoch == 5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_optimizer_of_two_that_is_never_stepped(strategy: str) -> None:
    model = Manual()
    model.overflows = set(range(8))
    callback = LossScaling(init_scale=256.0, max_skipped_steps=5)
    with pytest.raises(TooManySkippedStepsError, match=r"5 steps in a row .* that of net\.3\.\w+; 2 of 2 parameters"):
        train(model, strategy, callback)
    assert model.trainer.fit_loop.epoch_loop.batch_idx == 4


# -- schedules ------------------------------------------------------------------------------------------------------


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=20),
    "restarts": lambda optimizer: CosineAnnealingWarmRestarts(optimizer, 3),
    "sequential": lambda optimizer: SequentialLR(
        optimizer, [LambdaLR(optimizer, lambda step: step + 1), LambdaLR(optimizer, lambda step: 9 / (step + 1))], [2]
    ),
    "ours": lambda optimizer: lightning_optim.schedulers.Linear(optimizer, total_steps=20),
}


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.. before .optimizer.step")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_schedule_waits_for_steps_that_were_skipped(schedule: str) -> None:
    """Lightning's own strategies advance it (PL#5558)."""

    class Scheduled(Scaled):
        def configure_optimizers(self) -> Any:
            optimizer = self.make(self.parameters())
            config = {"interval": "step", "scheduler": SCHEDULES[schedule](optimizer)}
            return {"optimizer": optimizer, "lr_scheduler": config}

    steps = SCHEDULES[schedule](torch.optim.AdamW(network().parameters(), lr=0.05))
    rates = [steps.get_last_lr()[0]]
    for _ in range(8):
        steps.optimizer.step()
        steps.step()
        rates.append(steps.get_last_lr()[0])
    done = [1, 2, 2, 2, 3, 4, 4, 5]
    for strategy in STRATEGIES:
        run, found = train(Scheduled(), strategy, LossScaling(init_scale=256.0))
        assert found.lrs == [rates[step] for step in done]
        assert run.global_step == 8
    _, stock = fit(Scheduled(), "auto", plugins=[half(GradScaler("cpu", 256.0))])
    assert stock.lrs == rates[1:]


# -- an end with a reason -------------------------------------------------------------------------------------------


class Bad(Scaled):
    """Gradients of one layer overflow from some batch on."""

    def __init__(self, make: Any = None, begin: int = 2) -> None:
        super().__init__(make)
        self.overflows, self.begin = set(), begin
        self.net[1].weight.register_hook(self.spoil)

    def spoil(self, gradient: Tensor) -> Tensor:
        return gradient * math.inf if self.trainer.fit_loop.epoch_loop.batch_idx >= self.begin else gradient


@pytest.mark.parametrize("most", [2, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["ours", "foreign"])
def test_it_gives_up_and_leaves_nothing_behind(name: str, strategy: str, most: int) -> None:
    """Neither weights that are infinite, nor a scaler: the Trainer trains on, and can be copied."""
    model, callback, plugin = Bad(OPTIMIZERS[name]), LossScaling(**SETTINGS, max_skipped_steps=most), half()
    stock = plugin.scaler
    trainer = make_trainer(strategy=strategy, plugins=[plugin], callbacks=[callback])
    with pytest.raises(TooManySkippedStepsError, match=rf"{most} steps .* that of net\.1\.weight; 1 of 6 parameters had one"):
        trainer.fit(model)
    assert trainer.fit_loop.epoch_loop.batch_idx == 2 + most - 1
    assert all(p.isfinite().all() for p in model.parameters())
    assert plugin.scaler is stock
    assert stock.get_scale() == 512.0 * 0.5 ** (most - 1)
    assert callback.scaler is not None
    assert callback.scaler.after_step is None
    assert "lr_scheduler_step" not in model.__dict__
    copy.deepcopy(callback)
    model.begin = 100
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert plugin.scaler is stock


def test_stock_goes_on_for_ever() -> None:
    """Until the scale is zero, when every gradient is NaN, and no loss can bring it back."""
    model = Bad()
    run, found = fit(model, "auto", plugins=[half(GradScaler("cpu", backoff_factor=2.0**-60))])
    assert states(run)["scale"] == 0.0
    assert all(torch.equal(found.weights[-1][name], value) for name, value in found.weights[2].items())


# -- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), list(itertools.product(STRATEGIES, repeat=2)))
def test_a_run_resumes_bit_for_bit(first: str, second: str, tmp_path: Path) -> None:
    """From a checkpoint that was saved after the fit, when the plugin has its own scaler again, as well."""
    straight, expected = train(Scaled(), second, max_epochs=2)
    half_way, _ = train(Scaled(), first)
    half_way.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["MixedPrecision"]
    rest, found = train(Scaled(), second, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    expected.weights, expected.lrs = expected.weights[8:], expected.lrs[8:]
    assert_same_steps(found, expected, **(EXACT if first == second else CLOSE))
    assert saved["skipped_steps"] == [3]
    for run, skipped in ((rest, 6), (straight, 6)):
        callback = next(one for one in run.callbacks if isinstance(one, LossScaling))
        assert callback.scaler.state_dict()["skipped_steps"] == [skipped]
        assert callback.scaler.state_dict()["_growth_tracker"] == states(straight)["_growth_tracker"]
    assert states(rest) == states(straight)


class Saving(Scaled):
    """Saves a checkpoint in the middle of a run of skipped steps."""

    folder: Path

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.trainer.save_checkpoint(self.folder / "middle.ckpt")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_skipped_steps_are_counted_over_a_kill(strategy: str, tmp_path: Path) -> None:
    """The row of skipped steps began before the checkpoint."""
    model = Saving()
    model.folder = tmp_path
    model.overflows = {1, 2, 3, 4}
    with pytest.raises(TooManySkippedStepsError, match="4 steps in a row"):
        train(model, strategy, LossScaling(init_scale=256.0, max_skipped_steps=4))
    assert torch.load(tmp_path / "middle.ckpt", weights_only=True)["MixedPrecision"]["consecutive_skips"] == [2]
    model = Scaled()
    model.overflows = {1, 2, 3, 4}
    with pytest.raises(TooManySkippedStepsError, match="4 steps in a row"):
        train(model, strategy, LossScaling(init_scale=256.0, max_skipped_steps=4), ckpt_path=tmp_path / "middle.ckpt")
    assert model.trainer.fit_loop.epoch_loop.batch_idx == 4


@pytest.mark.parametrize("strategy", ["auto", "in_graph"])
def test_checkpoints_with_and_without_it_are_interchangeable(strategy: str, tmp_path: Path) -> None:
    class Constant(Scaled):
        """As Lightning advances schedules for skipped steps, runs are comparable without one."""

        def configure_optimizers(self) -> Any:
            return super().configure_optimizers()["optimizer"]

    settings: dict[str, Any] = {"init_scale": 256.0, "growth_interval": 3}

    def run(ours: bool, **more: Any) -> Any:
        if ours:
            return train(Constant(), strategy, LossScaling(**settings), **more)
        return fit(Constant(), strategy, plugins=[half(GradScaler("cpu", **settings))], **more)

    straight, expected = run(ours=False, max_epochs=2)
    expected.weights, expected.lrs = expected.weights[8:], expected.lrs[8:]
    for ours in (True, False):
        run(ours)[0].save_checkpoint(tmp_path / "half.ckpt")
        rest, found = run(not ours, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
        assert_same_steps(found, expected, **EXACT)
        assert {key: states(rest)[key] for key in ("scale", "_growth_tracker")} == {
            key: states(straight)[key] for key in ("scale", "_growth_tracker")
        }


def test_a_second_fit_goes_on() -> None:
    """With the scale of the first, as without the callback; and a new Trainer begins anew."""
    callback = LossScaling(init_scale=256.0, growth_interval=4)
    trainer = make_trainer(plugins=[half()], callbacks=[callback])
    model = Model()
    trainer.fit(model)
    assert states(trainer)["scale"] == 1024.0
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert states(trainer)["scale"] == 4096.0
    assert callback.scaler is not None
    for other in (copy.deepcopy(trainer).callbacks[0].scaler, pickle.loads(pickle.dumps(callback.scaler))):  # noqa: S301
        assert other.state_dict() == callback.scaler.state_dict()
    again, _ = train(Model(), "auto", callback)
    assert states(again)["scale"] == 1024.0


# -- gradients and hooks --------------------------------------------------------------------------------------------


def clamp(net: nn.Module) -> None:
    for p in net.parameters():
        if p.grad is not None:
            p.grad.clamp_(-0.5, 0.5)


def replace(net: nn.Module) -> None:
    for p in net.parameters():
        if p.grad is not None:
            p.grad = p.grad * 0.5


def drop_one(net: nn.Module) -> None:
    net[0].weight.grad = None


HOOKS: dict[str, Hook] = {"changed in place": clamp, "replaced": replace, "dropped": drop_one}


class Hooked(Scaled):
    """Changes gradients in one way or another."""

    def __init__(self, make: Any, hook: str, change: Hook) -> None:
        super().__init__(make)
        self.hook, self.change = hook, change

    def on_after_backward(self) -> None:
        if self.hook == "on_after_backward":
            self.change(self.net)


class HookedBeforeTheStep(Hooked):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.change(self.net)


class HookedInTheStep(Hooked):
    def configure_optimizers(self) -> Any:
        config = super().configure_optimizers()
        config["optimizer"].register_step_pre_hook(lambda *_: self.change(self.net))
        return config


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("change", HOOKS)
@pytest.mark.parametrize("name", ["ours", "foreign"])
@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_optimizer_step"])
def test_what_hooks_do_to_gradients_is_not_lost(hook: str, name: str, change: str, strategy: str) -> None:
    cls = Hooked if hook == "on_after_backward" else HookedBeforeTheStep
    _, found = train(cls(OPTIMIZERS[name], hook, HOOKS[change]), strategy, gradient_clip_val=0.4)
    where = "after_backward" if hook == "on_after_backward" else "before_step"
    expected = by_hand(OPTIMIZERS[name], 0.4, **{where: HOOKS[change]})
    assert_same_steps(found, expected, **(EXACT if strategy == "auto" else CLOSE))


@pytest.mark.parametrize("strategy", ["in_graph", "detached"])
@pytest.mark.parametrize("change", HOOKS)
@pytest.mark.parametrize("clip", [None, 0.4])
@pytest.mark.parametrize("name", ["ours", "torch AdamW"])
def test_the_optimizers_own_hooks(name: str, clip: float | None, change: str, strategy: str) -> None:
    """They see gradients that are unscaled and clipped, as under Lightning's own strategies."""
    runs = [
        train(HookedInTheStep(OPTIMIZERS[name], "", HOOKS[change]), one, gradient_clip_val=clip)[1] for one in (strategy, "auto")
    ]
    assert_same_steps(*runs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hooks_of_parameters(strategy: str) -> None:
    def hooked(make: Any, params: Any) -> Any:
        params = list(params)
        params[0].register_hook(lambda gradient: gradient.clamp(-20.0, 20.0))
        return make(params)

    make = partial(hooked, OPTIMIZERS["ours"])
    _, found = train(Scaled(make), strategy)
    assert_same_steps(found, by_hand(make), **(EXACT if strategy == "auto" else CLOSE))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_that_are_dropped_altogether(strategy: str) -> None:
    """No step is made, and the scale stays. Without the callback Lightning's own strategies end in an error of torch's."""

    class Dropping(Model):
        def on_after_backward(self) -> None:
            if self.trainer.fit_loop.epoch_loop.batch_idx in (0, 3):
                self.zero_grad()

    callback = LossScaling(init_scale=256.0, growth_interval=6)
    run, found = train(Dropping(), strategy, callback)
    moved = [any(not torch.equal(a[key], b[key]) for key in a) for a, b in itertools.pairwise(found.weights)]
    assert moved == [batch != 3 for batch in range(1, 8)]
    assert states(run)["scale"] == 512.0
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        fit(Dropping(), "auto", plugins=[scaled()])


# -- what is in place of what ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whose_scaler_is_in_place(strategy: str) -> None:
    """One of ours, which our strategies drive in their step; validation alone needs none."""
    plugin, callback, seen = half(), LossScaling(), []
    stock = plugin.scaler

    class Watching(Model):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(type(plugin.scaler))
            assert getattr(plugin.scaler, "scaler", plugin.scaler) is callback.scaler

        def validation_step(self, *_: Any) -> None:
            pass

        def val_dataloader(self) -> Any:
            return self.train_dataloader()

    trainer = make_trainer(strategy=strategy, plugins=[plugin], callbacks=[callback])
    model = Watching()
    trainer.validate(model)
    assert callback.scaler is None
    trainer.fit(model)
    assert set(seen) == {LossScaler if strategy == "auto" else InStepScaler}
    assert plugin.scaler is stock


def test_a_scaler_of_ours_without_the_callback() -> None:
    """In the plugin; our strategies drive it, too."""
    runs = [fit(Scaled(), one, plugins=[half(LossScaler("cpu", **SETTINGS))]) for one in ("in_graph", "auto")]
    runs[1][1].lrs, runs[1][1].weights = runs[0][1].lrs, runs[1][1].weights[:3]  # before schedules differ
    runs[0][1].weights = runs[0][1].weights[:3]
    assert_same_steps(runs[0][1], runs[1][1])
    assert states(runs[0][0]) == states(runs[1][0])
    assert states(runs[0][0])["skipped_steps"] == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16-mixed"}, "precision='bf16-mixed': it scales no loss; valid: precision='16-mixed'"),
        ({"precision": "32-true"}, "precision='32-true': it scales no loss"),
        ({"plugins": [HalfPrecision("16-true")]}, "precision='16-true': its float16 gradients cannot be unscaled"),
        ({"plugins": [MixedPrecision("16-mixed", "cpu", GradScaler("cpu", enabled=False))]}, "precision='16-mixed'"),
    ],
    ids=["bf16-mixed", "32-true", "16-true", "disabled"],
)
def test_where_there_is_nothing_to_scale(options: dict[str, Any], message: str) -> None:
    """A warning, and the very run that it is without the callback."""

    def run(*callbacks: Any) -> Any:
        made = options | ({"plugins": copy.deepcopy(options["plugins"])} if "plugins" in options else {})
        return fit(Model(OPTIMIZERS["torch SGD"]), "auto", callbacks=callbacks, **made)[1]

    callback = LossScaling(log=True)
    with pytest.warns(LightningOptimWarning, match=f"LossScaling does nothing with {message}"):
        found = run(callback)
    assert callback.scaler is None
    assert_same_steps(found, run(), **EXACT, equal_nan=True)


class OwnScaler(GradScaler):
    pass


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"LossScaling: the precision plugin has .* a OwnScaler; valid: one of torch's"):
        train(Model(), plugin=half(OwnScaler("cpu")))
    with pytest.raises(ValueError, match="a LossScaler; valid"):
        train(Model(), plugin=half(LossScaler("cpu")))
    with pytest.raises(ValueError, match="LossScaling: the Trainer has two of these callbacks"):
        train(Model(), callbacks=[LossScaling()])

    class FakeDeepSpeedStrategy(lightning_optim.strategies.InGraphStrategy):
        pass

    with pytest.raises(ValueError, match="DeepSpeed scales the loss itself; valid: without this callback"):
        train(Model(), FakeDeepSpeedStrategy())
    with pytest.raises(ValueError, match="LossScaling: init_scale=-1; valid: a finite number > 0"):
        LossScaling(init_scale=-1)
    with pytest.raises(ValueError, match="LossScaling: log='yes' is not a bool"):
        LossScaling(log="yes")  # type: ignore[arg-type]


def test_settings_of_the_scaler_that_is_replaced() -> None:
    plugin = half(GradScaler("cpu", init_scale=8.0, growth_interval=2))
    with pytest.warns(LightningOptimWarning, match=r"scaler, whose init_scale=8.0, growth_interval=2 is not used"):
        train(Model(), plugin=plugin, callback=LossScaling())
    train(Model(), plugin=half(GradScaler("cpu", init_scale=8.0)), callback=LossScaling(init_scale=8.0))


@pytest.mark.parametrize("strategy", ["auto", "in_graph"])
def test_an_exception_in_the_middle(strategy: str) -> None:
    class Failing(Scaled):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            if self.trainer.fit_loop.epoch_loop.batch_idx == 4:
                raise RuntimeError("as said")

    plugin = half()
    stock = plugin.scaler
    with pytest.raises(RuntimeError, match="as said"):
        train(Failing(), strategy, plugin=plugin)
    assert plugin.scaler is stock
    assert stock.get_scale() == 128.0
    train(Scaled(), strategy, plugin=plugin)


def test_what_is_logged() -> None:
    from lightning.pytorch.loggers import CSVLogger

    found: list[tuple[float, float]] = []

    class Logger(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if "loss_scale" in metrics:
                found.append((metrics["loss_scale"], metrics["skipped_steps"]))

    for strategy in ("auto", "in_graph"):
        found.clear()
        callback = LossScaling(**SETTINGS, log=True)
        train(Scaled(), strategy, callback, logger=Logger("."), log_every_n_steps=1)
        scales = [256.0, 512.0, 256.0, 128.0, 128.0, 256.0, 128.0, 128.0]
        assert found == list(zip(scales, [0, 0, 1, 2, 2, 2, 3, 3], strict=True))


def test_the_other_root() -> None:
    model = model_class("pytorch_lightning")(OPTIMIZERS["torch AdamW"])
    model.overflows = OVERFLOWS
    from pytorch_lightning.plugins import MixedPrecision as Theirs

    for strategy in ("auto", "in_graph"):
        callback = callback_class("LossScaling", "pytorch_lightning")(**SETTINGS)
        net = copy.deepcopy(model)
        _, found = fit(net, strategy, plugins=[Theirs("16-mixed", "cpu")], callbacks=[callback])
        assert_same_steps(found, by_hand(OPTIMIZERS["torch AdamW"]))


def test_precision_of_the_trainers_flag() -> None:
    """Lightning makes ``bf16-mixed`` of ``16-mixed`` on a CPU: then there is nothing to do."""
    with (
        pytest.warns(LightningOptimWarning, match="precision='bf16-mixed'"),
        pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU"),
    ):
        fit(Model(), "auto", precision="16-mixed", callbacks=[LossScaling()])
