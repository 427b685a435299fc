"""Mistyped names and values of another type: one line, with what is valid."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from lightning_optim.cli.complaints import in_one_line
from lightning_optim.cli.optim_cli import OptimCLI

from .common import error_of, fit, known_warnings

pytestmark = known_warnings


def _last_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    message = error_of(capsys, lambda: fit(*arguments))
    assert len(message.splitlines()) < 12, "there is no page of usage"
    return message.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--optimizer=AdamW", "--optimizer.weight_deacy=1"],
            "--optimizer lightning_optim.AdamW has no option 'weight_deacy' (did you mean 'weight_decay'?); valid: lr",
        ),
        (
            ["--optimizer=torch.optim.AdamW", "--optimizer.lrr=1"],
            "--optimizer torch.optim.AdamW has no option 'lrr' (did you mean 'lr'?); valid: lr, betas",
        ),
        (
            ["--optimizer=SAM", "--optimizer.base=Lion", "--optimizer.base.lrr=1"],
            "--optimizer.base lightning_optim.Lion has no option 'lrr' (did you mean 'lr'?); valid: lr, betas",
        ),
        (
            ["--optimizer=SAM", "--optimizer.rhoo=1"],
            "--optimizer lightning_optim.SAM has no option 'rhoo' (did you mean 'rho'?); valid: base, rho, adaptive",
        ),
        (
            ["--optimizer=AdamW", "--lr_scheduler=Cosine", "--lr_scheduler.warmup_step=1"],
            "--lr_scheduler lightning_optim.Cosine has no option 'warmup_step' (did you mean 'warmup_steps'?); valid: ",
        ),
        (
            ["--optimizer=AdamW", "--param_groups.layer_deacy=1"],
            "--param_groups has no option 'layer_deacy' (did you mean 'layer_decay'?); valid: weight_decay, ",
        ),
        (
            ["--trainer.strategy=lightning_optim.strategies.InGraphStrategy", "--trainer.strategy.undoo=1"],
            "InGraphStrategy has no option 'undoo' (did you mean 'undo'?); valid: device, ",
        ),
        (["--optimizer=AdamW", "--optimizer.lr=abc"], "--optimizer.lr abc; valid: float, torch.Tensor"),
        (
            ["--optimizer=AdamW", "--optimizer.betas=[0.9,0.9,0.9]"],
            "--optimizer.betas [0.9, 0.9, 0.9]; valid: tuple with 2 elements",
        ),
        (
            ["--optimizer=SAM", "--optimizer.base=Lion", "--optimizer.base.lr=abc"],
            "--optimizer.base.lr abc; valid: float, torch.Tensor",
        ),
        (["--optimizer=AdamW", "--param_groups.no_decay=3"], "--param_groups.no_decay 3; valid: list[str], null"),
        (["--optimizer=AdamW", "--lr_interval=batch"], "--lr_interval batch; valid: 'step', 'epoch', null"),
        (["--optimizer=AdamW", "--trainer.max_steps=abc"], "--trainer.max_steps abc; valid: int"),
        (["--optimizer=Adamww"], "There is no optimizer 'Adamww'. Did you mean 'adamw'?"),
        (["--optimizer=SAM", "--optimizer.base=Lionn"], "There is no optimizer 'Lionn'. Did you mean 'lion'?"),
        (["--optimizer.help=Adamww"], "There is no optimizer 'Adamww'. Did you mean 'adamw'?"),
        (["--lr_scheduler.help", "cosin"], "There is no lr_scheduler 'cosin'. Did you mean 'cosine'?"),
        (
            ["--optimizer=lightning_optim.Adamww"],
            "module 'lightning_optim' has no attribute 'Adamww' (did you mean 'AdamW'?)",
        ),
        (["--optimizer=my.Optimizer"], "--optimizer my.Optimizer: No module named 'my'"),
        (["--optimizer.lr=0.1"], "--optimizer.lr without a class: give --optimizer NAME before it"),
        (["--optimzer.lr=0.1"], "unknown option --optimzer.lr (did you mean '--optimizer.lr'?)"),
        (["--trainer.stratgy=ddp"], "unknown option --trainer.stratgy (did you mean '--trainer.strategy'?)"),
    ],
)
def test_a_flag(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    last = _last_line(capsys, *arguments)
    assert last.startswith("error: ")
    assert line in last


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"optimzer": "AdamW"}, "unknown key 'optimzer' (did you mean 'optimizer'?)"),
        ({"trainer": {"stratgy": "ddp"}}, "unknown key 'trainer.stratgy' (did you mean 'trainer.strategy'?)"),
        (
            {"optimizer": {"class_path": "AdamW", "init_args": {"lrr": 1}}},
            "--optimizer lightning_optim.AdamW has no option 'lrr' (did you mean 'lr'?)",
        ),
        (
            {"optimizer": "AdamW", "param_groups": {"no_deacy": []}},
            "--param_groups has no option 'no_deacy' (did you mean 'no_decay'?)",
        ),
    ],
)
def test_a_file(content: object, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert line in _last_line(capsys, f"--config={tmp_path / 'config.yaml'}")


def test_a_missing_model(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, lambda: OptimCLI(args=["fit", "--optimizer=AdamW"], save_config_callback=None))
    assert message.splitlines()[-1] == "error: missing: --model"


def test_a_message_of_another_form_stays() -> None:
    message = "something new\n  in two lines"
    assert in_one_line(message, ["optimizer"], lambda option, name: "") == message
