"""``LossScaling``: trainings that end early, and checkpoints."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies.common import (
    CLOSE,
    EXACT,
    OPTIMIZERS,
    Model,
    assert_same_steps,
    fit,
    make_trainer,
)
from torch import Tensor

from lightning_optim.callbacks import LossScaling
from lightning_optim.control.loss_scale import TooManySkippedStepsError

from .scaling import (
    SETTINGS,
    STRATEGIES,
    GradScaler,
    Scaled,
    half,
    marks,
    states,
    train,
)

pytestmark = marks


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
    with pytest.raises(
        TooManySkippedStepsError, match=rf"{most} steps .* that of net\.1\.weight; 1 of 6 parameters had one"
    ):
        trainer.fit(model)
    assert trainer.fit_loop.epoch_loop.batch_idx == 2 + most - 1
    assert all(p.isfinite().all() for p in model.parameters())
    assert plugin.scaler is stock
    assert stock is not None
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


@pytest.mark.parametrize(
    ("first", "second"), [*((one, one) for one in STRATEGIES), *itertools.pairwise([*STRATEGIES, "auto"])]
)
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
        callback: Any = next(one for one in run.callbacks if isinstance(one, LossScaling))
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
