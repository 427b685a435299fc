"""Command lines: plain LightningCLI, and ``lightning-optim fit``."""

from __future__ import annotations

from pathlib import Path

import pytest
import references
from lightning.pytorch.cli import LightningCLI

from lightning_optim import optimizer_info
from lightning_optim.optimizers import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS

from .common import Flagged, asks_for_evaluations, changed, each, known_warnings

pytestmark = known_warnings


def _flags(folder: Path, *flags: str) -> list[str]:
    quiet = ("logger=false", "enable_checkpointing=false", "enable_progress_bar=false", "enable_model_summary=false")
    run = ("accelerator=cpu", "devices=1", "max_epochs=1", f"default_root_dir={folder}")
    return ["fit", *flags, *(f"--trainer.{flag}" for flag in (*quiet, *run))]


def _strategy(cls: type) -> tuple[str, ...]:
    """What answers steps that ask for evaluations."""
    return ("--trainer.strategy=in_graph",) if asks_for_evaluations(cls) else ()


def _public_name(name: str) -> str:
    return optimizer_info(name).cls.public_name()


@pytest.mark.matrix(unless=lambda name, how: references.representative(name) if how == "path" else name == "adamw")
@each
@pytest.mark.parametrize("how", ["path", "class name"])
def test_lightning_cli(name: str, how: str, tmp_path: Path) -> None:
    """Plain LightningCLI: ``--optimizer lightning_optim.Lion``, and ``--optimizer Lion`` once it is imported."""
    cls: type[RuleOptimizer] = optimizer_info(name).cls
    spelled = f"lightning_optim.{_public_name(name)}" if how == "path" else cls.__qualname__
    flags = ("--optimizer", spelled, "--optimizer.lr=0.02", "--optimizer.max_grad_norm=1.0", "--optimizer.engine=eager")
    cli = LightningCLI(Flagged, args=_flags(tmp_path, *flags, *_strategy(cls)), save_config_callback=None)
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is cls
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert optimizer.options.max_grad_norm == 1.0
    assert optimizer.options.engine == "eager"
    assert changed(cli.model.net)


@pytest.mark.parametrize("name", [name for name, info in OPTIMIZERS.items() if info.torch_equivalent])
def test_lightning_cli_leaves_torchs_names_alone(name: str, tmp_path: Path) -> None:
    """``--optimizer AdamW`` is torch's, also with ours imported: no "Multiple subclasses with name"."""
    twin = optimizer_info(name).torch_equivalent
    assert twin is not None
    flags = ("--optimizer", twin.__name__, "--optimizer.lr=0.02")
    cli = LightningCLI(Flagged, args=_flags(tmp_path, *flags), save_config_callback=None)
    assert type(cli.trainer.optimizers[0]) is twin


@references.common_to_all
@each
def test_lightning_cli_refuses_misspelled_flags(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--optimizer", f"lightning_optim.{_public_name(name)}", "--optimizer.weight_deacy=0.1")
    with pytest.raises(SystemExit):
        LightningCLI(Flagged, args=_flags(tmp_path, *flags), save_config_callback=None)
    assert "weight_deacy" in capsys.readouterr().err


@references.common_to_all
@each
def test_optim_cli(name: str, tmp_path: Path) -> None:
    """``lightning-optim fit``: the familiar name is ours, and a full path means what it says."""
    from lightning_optim.cli.optim_cli import OptimCLI

    flags = ("--optimizer", _public_name(name), "--optimizer.lr=0.02")
    cls = optimizer_info(name).cls
    cli = OptimCLI(Flagged, args=_flags(tmp_path, *flags, *_strategy(cls)), save_config_callback=None)
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is optimizer_info(name).cls
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert changed(cli.model.net)
