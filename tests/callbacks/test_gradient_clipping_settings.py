"""``GradientClipping``: what is refused when a fit starts, and the command line."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from strategies.common import (
    OPTIMIZERS,
    Model,
    fit,
    make_trainer,
)

import lightning_optim
from lightning_optim.callbacks import GradientClipping
from lightning_optim.control.clipping import AGC, AdaGC
from lightning_optim.control.clipping.conflicts import optimizer_conflict
from lightning_optim.strategies import DetachedStrategy, InGraphStrategy

from .clipped import (
    known_warnings,
)

pytestmark = [*known_warnings, pytest.mark.usefixtures("one_thread")]

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
    plain: Any = {"lightning_module": module, "precision_plugin": SimpleNamespace(scaler=None)}
    parts = SimpleNamespace(strategy=FSDPStrategy(), optimizers=[optimizer], **plain)
    assert "a module that wraps parts of itself" in str(conflict(parts))
    whole = FSDPStrategy()
    whole.model = type("Wrapped", (), {"clip_grad_norm_": None})()
    two = SimpleNamespace(strategy=whole, optimizers=[optimizer, optimizer], **plain)
    assert "FSDP1 and 2 optimizers" in str(conflict(two))
    # With a loss scaler, FSDP1's own method would be called for steps that are skipped, and for scaled gradients.
    scales = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    scaled = trainer(FSDPStrategy())
    scaled._accelerator_connector.precision_plugin = scaled.strategy.precision_plugin = scales
    with pytest.raises(ValueError, match=r"error_if_nonfinite=True under FSDPStrategy.*valid: error_if_nonfinite=Fals"):
        GradientClipping(max_norm=1.0, error_if_nonfinite=True).setup(scaled, module, "fit")
    fused = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    parts = SimpleNamespace(strategy=whole, optimizers=[fused], lightning_module=module, precision_plugin=scales)
    clipping = GradientClipping(max_norm=1.0)
    assert "fused=True" in str(optimizer_conflict(parts, fused, clipping))
    assert optimizer_conflict(parts, optimizer, clipping) is None


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
    cli: Any = LightningCLI(Model, args=[*quiet, *arguments], run=False, save_config_callback=None)
    return next(one for one in cli.trainer.callbacks if isinstance(one, GradientClipping))


def test_the_bare_name_is_known_wherever_this_package_is_imported() -> None:
    code = """
import lightning_optim
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
flags = ["--trainer.callbacks+=GradientClipping", "--trainer.callbacks.max_value=0.5"]
cli = LightningCLI(BoringModel, args=flags, run=False)
print([type(callback).__name__ for callback in cli.trainer.callbacks])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'GradientClipping'" in done.stdout
