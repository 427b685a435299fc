"""``LossScaling``: whose scaler is in place when, what is refused, and how it is given."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from strategies.common import (
    EXACT,
    OPTIMIZERS,
    Model,
    assert_same_steps,
    fit,
    make_trainer,
    model_class,
)

import lightning_optim
from lightning_optim.callbacks import LossScaling
from lightning_optim.callbacks.roots import callback_class
from lightning_optim.control.loss_scale import LossScaler
from lightning_optim.strategies import InGraphStrategy
from lightning_optim.strategies.scaler import InStepScaler
from lightning_optim.warnings import LightningOptimWarning

from .scaling import (
    OVERFLOWS,
    SETTINGS,
    STRATEGIES,
    GradScaler,
    Scaled,
    by_hand,
    half,
    marks,
    states,
    train,
)

pytestmark = marks


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
    with pytest.raises(
        ValueError, match=r"LossScaling: the precision plugin has .* class OwnScaler; valid: a torch.amp"
    ):
        train(Model(), plugin=half(OwnScaler("cpu")))
    with pytest.raises(ValueError, match="of class LossScaler; valid"):
        train(Model(), plugin=half(LossScaler("cpu")))
    with pytest.raises(ValueError, match="LossScaling: the Trainer has two of these callbacks"):
        train(Model(), callbacks=[LossScaling()])

    class FakeDeepSpeedStrategy(InGraphStrategy):
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
    assert stock is not None
    assert stock.get_scale() == 128.0
    train(Scaled(), strategy, plugin=plugin)


def test_what_is_logged() -> None:
    from lightning.pytorch.loggers import CSVLogger

    found: list[tuple[float, float]] = []

    class Logger(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if "loss_scale" in metrics:
                found.append((metrics["loss_scale"], metrics["skipped_steps"]))

    for strategy in ("auto", "in_graph"):
        found.clear()
        callback = LossScaling(**SETTINGS, log=True)
        train(Scaled(), strategy, callback, logger=Logger("."), log_every_n_steps=1)
        scales = [256.0, 512.0, 256.0, 128.0, 128.0, 256.0, 128.0, 128.0]
        assert found == list(zip(scales, [0, 0, 1, 2, 2, 2, 3, 3], strict=True))


def test_by_flags_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And by the YAML of the documentation; what is wrong is said in one line."""
    from lightning.pytorch.cli import LightningCLI

    from lightning_optim.cli.optim_cli import OptimCLI

    text = (Path(lightning_optim.__file__).parents[1] / "docs" / "loss_scaling.md").read_text()
    (tmp_path / "config.yaml").write_text(text.partition("```yml\n")[2].partition("```")[0])
    monkeypatch.chdir(tmp_path)
    flag = "--trainer.callbacks+=lightning_optim.callbacks.LossScaling"
    common: dict[str, Any] = {"run": False, "save_config_callback": None, "seed_everything_default": 1}
    cases: list[tuple[list[str], dict[str, Any]]] = [
        ([flag, "--trainer.callbacks.max_scale=null", "--trainer.callbacks.init_scale=1e3"], {"init_scale": 1e3}),
        (["--config=config.yaml"], {"max_scale": 65536.0, "max_skipped_steps": 20}),
    ]
    for cls, (words, settings) in itertools.product((LightningCLI, OptimCLI), cases):
        made: Any = cls(Scaled, args=["--trainer.logger=false", "--trainer.accelerator=cpu", *words], **common)
        callback = next(one for one in made.trainer.callbacks if isinstance(one, LossScaling))
        assert callback.settings == LossScaling(**settings).settings
    with pytest.raises(SystemExit):
        OptimCLI(Scaled, args=[flag, "--trainer.callbacks.initial_scale=3"], **common)
    assert "LossScaling has no option 'initial_scale' (did you mean 'init_scale'?)" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ours", "torch AdamW"])
def test_on_cuda_nothing_waits_for_the_device(name: str) -> None:
    """Counts and bounds of a step are kept there; its schedule learns of it at the next step."""

    class Strict(Scaled):
        def on_train_batch_start(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def on_train_batch_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    callback = LossScaling(**SETTINGS)
    options: dict[str, Any] = {"accelerator": "cuda", "precision": "16-mixed"}
    _, found = fit(Strict(OPTIMIZERS[name]), "in_graph", callbacks=[callback], **options)
    assert found.lrs == [pytest.approx(0.05 / (1 + done)) for done in (1, 2, 3, 3, 3, 4, 5, 5)]
    assert callback.scaler is not None
    assert callback.scaler.state_dict()["skipped_steps"] == [3]


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
