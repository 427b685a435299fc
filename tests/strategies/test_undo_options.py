"""``undo`` as an option: in code, on the command line and in YAML; and what it cannot go with."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

import lightning_optim
from lightning_optim.control.rollback.policy import UndoPolicy
from lightning_optim.strategies import InGraphDDPStrategy, InGraphFSDP2Strategy, InGraphStrategy
from lightning_optim.warnings import LightningOptimWarning

from .common import OPTIMIZERS, Model, fit, known_warnings, make_trainer

pytestmark = known_warnings

STRATEGIES = [InGraphStrategy, InGraphDDPStrategy, InGraphFSDP2Strategy]


@pytest.mark.parametrize("cls", STRATEGIES)
@pytest.mark.parametrize(
    ("option", "policy"),
    [(False, None), (True, UndoPolicy()), ({"factor": 0.1}, UndoPolicy(factor=0.1)), (UndoPolicy(), UndoPolicy())],
    ids=str,
)
def test_every_way_to_say_it(cls: Any, option: Any, policy: Any) -> None:
    assert cls(undo=option).undo == policy


@pytest.mark.parametrize("cls", STRATEGIES)
def test_wrong_options_are_refused_at_once(cls: Any) -> None:
    with pytest.raises(TypeError, match="undo has no option 'treshold'; valid: threshold"):
        cls(undo={"treshold": 6.0})
    with pytest.raises(ValueError, match="after_cap='pray'; valid: continue, stop, raise"):
        cls(undo={"after_cap": "pray"})


def _command_line(*args: str) -> Any:
    return LightningCLI(
        Model,
        run=False,
        save_config_callback=None,
        args=["--trainer.accelerator=cpu", "--trainer.logger=false", "--model.make=null", *args],
    ).trainer.strategy


@pytest.mark.parametrize("cls", STRATEGIES)
def test_the_command_line(cls: Any) -> None:
    strategy = f"--trainer.strategy=lightning_optim.strategies.{cls.__name__}"
    assert _command_line(strategy, "--trainer.strategy.undo=true").undo == UndoPolicy()
    nested = ("--trainer.strategy.undo.threshold=6", "--trainer.strategy.undo.max_undos=3")
    assert _command_line(strategy, *nested).undo == UndoPolicy(threshold=6.0, max_undos=3)
    assert _command_line(strategy, '--trainer.strategy.undo={"factor": 0.25}').undo == UndoPolicy(factor=0.25)


@pytest.mark.parametrize(
    ("text", "policy"),
    [("true", UndoPolicy()), ("{threshold: 6, after_cap: stop}", UndoPolicy(threshold=6, after_cap="stop"))],
)
def test_yaml(text: str, policy: UndoPolicy, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "trainer:\n  strategy:\n    class_path: lightning_optim.strategies.InGraphStrategy\n"
        f"    init_args:\n      undo: {text}\n"
    )
    assert _command_line(f"--config={path}").undo == policy


def test_typos_on_the_command_line_are_errors() -> None:
    strategy = "--trainer.strategy=lightning_optim.strategies.InGraphStrategy"
    with pytest.raises(ValueError, match="undo has no option 'treshold'; valid: threshold"):
        _command_line(strategy, "--trainer.strategy.undo.treshold=6")


# --- what it cannot go with


class Manual(Model):
    """Steps when it wants to."""

    def __init__(self, make: Any = None) -> None:
        super().__init__(make)
        self.automatic_optimization = False


class Two(Manual):
    """With two optimizers, which Lightning has in manual optimization only: that comes first."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([p], lr=0.1) for p in list(self.parameters())[:2]]


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "manual": (lambda: Manual(OPTIMIZERS["ours"]), {}, "undo with manual optimization.*valid: undo=False"),
    "two": (Two, {}, "undo with manual optimization"),
    "backward": (lambda: Model(OPTIMIZERS["ours"]), {"step_in_backward": True}, "undo with step_in_backward=True"),
    "capture": (lambda: Model(OPTIMIZERS["ours"]), {"capture": True}, "undo with capture=True.*valid: one of them"),
    "state elsewhere": (lambda: Model(lightning_optim.LBFGS), {}, "undo with LBFGS.*keeps state elsewhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_before_the_first_step(case: str) -> None:
    model, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        fit(model(), InGraphStrategy(undo=True, **options))


def test_schedules_that_are_not_known_get_a_warning() -> None:
    class Own(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self) -> list[float | torch.Tensor]:
            return [0.1 / (1 + self.last_epoch) for _ in self.optimizer.param_groups]

    class Scheduled(Model):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Own(optimizer), "interval": "step"}}

    with pytest.warns(LightningOptimWarning, match="Own keeps by torch's names"):
        fit(Scheduled(), InGraphStrategy(undo=True))


def test_barebones() -> None:
    """A Trainer that must not log."""
    trainer = make_trainer(strategy=InGraphStrategy(undo=True), barebones=True)
    trainer.fit(Model(OPTIMIZERS["ours"]))
    assert trainer.global_step == 8


def test_a_trainer_that_was_used_can_go_to_other_processes() -> None:
    trainer = make_trainer(strategy=InGraphStrategy(undo=True))
    trainer.fit(Model(OPTIMIZERS["ours"]))
    (keeper,) = (callback for callback in trainer.callbacks if type(callback).__name__ == "SpikeRollback")
    copied = pickle.loads(pickle.dumps(keeper))  # noqa: S301 # of our own making
    assert type(copied) is type(keeper)
    assert copied.state_dict() == keeper.state_dict()


def test_other_stages_are_not_concerned() -> None:
    class Validated(Model):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("seen", float(batch_idx))

        def val_dataloader(self) -> Any:
            return self.train_dataloader()

    trainer = make_trainer(strategy=InGraphStrategy(undo=True))
    trainer.validate(Validated(), verbose=False)
    assert trainer.strategy.undo_records == []
    assert not any(type(callback).__name__ == "SpikeRollback" for callback in trainer.callbacks)
