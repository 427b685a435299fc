"""What is said where a class takes the place of a file's, and names in environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml  # type: ignore[import-untyped]

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

import lightning_optim
from lightning_optim.cli import optim_cli
from lightning_optim.cli.names import short_names
from lightning_optim.cli.optim_cli import OptimCLI

from .common import QUIET, Model, build, known_warnings

pytestmark = known_warnings

_ADAMW = {"class_path": "AdamW", "init_args": {"lr": 0.003, "betas": [0.9, 0.95], "eps": 1e-7}}


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the command says. Not by way of a logger: which one is Lightning's depends on what was imported before."""
    lines: list[str] = []
    monkeypatch.setattr(optim_cli, "rank_zero_info", lines.append)
    return lines


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--optimizer=Lion"], "keeps lr=0.003, betas=[0.9, 0.95]; drops eps=1e-07"),
        (["--optimizer=Lion", "--optimizer.lr=0.1"], "keeps betas=[0.9, 0.95]; drops eps=1e-07"),
        (["--optimizer=torch.optim.AdamW"], "keeps lr=0.003, betas=[0.9, 0.95], eps=1e-07"),
        (["--optimizer=SAM", "--optimizer.base=Lion"], "drops lr=0.003, betas=[0.9, 0.95], eps=1e-07"),
        (["--optimizer=adamw"], None),
        ([], None),
    ],
)
def test_what_another_class_keeps_of_a_file(
    flags: list[str], said: str | None, tmp_path: Path, spoken: list[str]
) -> None:
    """As in every LightningCLI, but not in silence."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"optimizer": _ADAMW}, sort_keys=False))
    optimizer = build(f"--config={tmp_path / 'config.yaml'}", *flags)["optimizer"]
    lines = [line for line in spoken if "in place of the file's" in line]
    assert lines == [line for line in lines if said and line.endswith(said)]
    assert len(lines) == (said is not None)
    if said and "keeps lr" in said:
        assert optimizer.param_groups[0]["lr"] == 0.003


def test_the_file_of_a_command(tmp_path: Path, spoken: list[str]) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"fit": {"optimizer": _ADAMW}}, sort_keys=False))
    arguments = [f"--config={tmp_path / 'config.yaml'}", "fit", "--trainer.fast_dev_run=true", *QUIET]
    OptimCLI(Model, args=[*arguments, "--optimizer=Lion"], save_config_callback=None)
    assert any("keeps lr=0.003, betas=[0.9, 0.95]; drops eps=1e-07" in line for line in spoken)


def test_bare_names_in_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_FIT__OPTIMIZER", "AdamW")
    monkeypatch.setenv("PL_FIT__LR_SCHEDULER", "cosine")
    cli = OptimCLI(
        Model,
        args=["fit", "--trainer.fast_dev_run=true", *QUIET],
        parser_kwargs={"default_env": True, "fit": {"default_env": True}},
        save_config_callback=None,
    )
    assert type(cli.trainer.optimizers[0]) is lightning_optim.AdamW is not torch.optim.AdamW
    assert type(cli.trainer.lr_scheduler_configs[0].scheduler) is lightning_optim.Cosine


def test_variables_that_are_not_of_these_options_stay() -> None:
    variables = {"PL_FIT__MODEL__OPTIMIZER": "AdamW", "OPTIMIZER": "AdamW", "PL_FIT__OPTIMIZER": "{lr: 1}"}
    assert short_names().in_environment(variables) == variables
    assert short_names().in_environment({"MY_APP_OPTIMIZER": "adamw"}) == {"MY_APP_OPTIMIZER": "lightning_optim.AdamW"}
