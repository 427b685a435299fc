"""Configuration that is printed and saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml  # type: ignore[import-untyped]

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

import lightning_optim
from lightning_optim.cli.optim_cli import OptimCLI

from .common import MODULE, QUIET, fit, known_warnings, optimizer_of

pytestmark = known_warnings


def test_the_printed_configuration_is_one_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--optimizer=AdamW", "--optimizer.betas=[0.5,0.75]", "--lr_scheduler=wsd", "--param_groups={}"]
    with pytest.raises(SystemExit) as exit_info:
        fit(*arguments, "--print_config")
    assert exit_info.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["optimizer"]["class_path"] == "lightning_optim.AdamW"
    cli = OptimCLI(args=["fit", f"--config={file}"], save_config_callback=None)
    assert type(optimizer_of(cli)) is lightning_optim.AdamW
    assert optimizer_of(cli).param_groups[0]["betas"] == (0.5, 0.75)
    assert len(optimizer_of(cli).param_groups) == 2


def test_the_saved_configuration_repeats_the_run(tmp_path: Path) -> None:
    arguments = [f"--trainer.default_root_dir={tmp_path}", "--optimizer=Lion", "--optimizer.lr=0.01"]
    arguments += ["--lr_scheduler=Linear", "--lr_scheduler.warmup_steps=0.5", "--param_groups.weight_decay=0.1"]
    first = OptimCLI(args=["fit", f"--model={MODULE}.Model", "--trainer.max_steps=4", *QUIET, *arguments])
    second = OptimCLI(args=["fit", f"--config={tmp_path / 'config.yaml'}"], save_config_callback=None)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
