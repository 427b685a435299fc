"""SAM from flags and files, with another optimizer nested in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from cli.common import MODULE, QUIET, fit, known_warnings, optimizer_of
from lightning.pytorch.cli import LightningCLI

import lightning_optim
from lightning_optim.optimizers.sam import SAM

pytestmark = known_warnings


def _file(folder: Path, base: dict[str, Any], **more: Any) -> str:
    path = folder / "sam.yaml"
    path.write_text(yaml.safe_dump({"optimizer": {"class_path": "SAM", "init_args": {"base": base} | more}}))
    return f"--config={path}"


def test_nested_in_a_file(tmp_path: Path) -> None:
    config = _file(tmp_path, {"class_path": "AdamW", "init_args": {"lr": 0.02}}, rho=0.1, adaptive=True)
    optimizer: Any = optimizer_of(fit(config))
    assert type(optimizer) is SAM
    assert isinstance(optimizer.base, lightning_optim.AdamW)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["sam_rho"], group["sam_adaptive"]) == (0.02, 0.1, True)


def test_as_flags() -> None:
    optimizer: Any = optimizer_of(
        fit("--optimizer=sam", "--optimizer.rho=0.2", "--optimizer.base=torch.optim.RMSprop", "--optimizer.base.lr=0.5")
    )
    assert type(optimizer.base) is torch.optim.RMSprop
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["sam_rho"]) == (0.5, 0.2)


def test_groups_are_split_as_the_base_would_have_it(tmp_path: Path) -> None:
    config = _file(tmp_path, {"class_path": "AdamW", "init_args": {"weight_decay": 0.3}})
    optimizer = optimizer_of(fit(config, "--param_groups={}", "--lr_scheduler=Linear"))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    config = _file(tmp_path, {"class_path": "Muon"})
    kinds = [group["use_muon"] for group in optimizer_of(fit(config)).param_groups]
    assert kinds == [True, False]


def test_lightnings_own_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By full paths, which import by themselves."""
    monkeypatch.setattr("sys.argv", ["fit"])  # it would look at pytest's
    path = tmp_path / "plain.yaml"
    base = {"class_path": "lightning_optim.Lion", "init_args": {"lr": 0.01}}
    optimizer = {"class_path": "lightning_optim.SAM", "init_args": {"base": base}}
    path.write_text(yaml.safe_dump({"optimizer": optimizer}))
    cli = LightningCLI(
        args=["fit", f"--model={MODULE}.Model", f"--config={path}", "--trainer.max_steps=2", *QUIET],
        save_config_callback=None,
    )
    made: Any = cli.trainer.optimizers[0]
    assert type(made) is SAM
    assert type(made.base) is lightning_optim.Lion
