"""Errors name the bad key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from .common import error_of, fit, known_warnings

pytestmark = known_warnings


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--optimizer=AdamW", "--optimizer.lrr=1"], ["lrr", "lightning_optim.AdamW"]),
        (["--optimizer=AdamW", "--optimizer.fused=true"], ["--optimizer.fused true", "valid: False, null"]),
        (["--optimizer=Lionn"], ["There is no optimizer 'Lionn'", "'lion'"]),
        (["--optimizer=SGD", "--lr_scheduler=cosin"], ["There is no lr_scheduler 'cosin'", "'cosine'"]),
        (["--optimizer=SGD", "--param_groups.decay=1"], ["param_groups", "decay"]),
        (["--optimizer=SGD", "--lr_interval=batch"], ["lr_interval", "batch"]),
        (["--lr_scheduler=Cosine"], ["--lr_scheduler is of no use without --optimizer"]),
        (["--param_groups={}"], ["--param_groups is of no use without --optimizer"]),
        ([], ["Model has no configure_optimizers of its own", "--optimizer AdamW"]),
    ],
)
def test_errors(arguments: list[str], named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, lambda: fit(*arguments))
    for text in named:
        assert text in message


def test_errors_in_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "typo.yaml"
    file.write_text(yaml.safe_dump({"optimizer": {"class_path": "AdamW", "init_args": {"betaz": [0.9, 0.99]}}}))
    assert "betaz" in error_of(capsys, lambda: fit(f"--config={file}"))
    file.write_text("optimizer: [unclosed")
    assert "config" in error_of(capsys, lambda: fit(f"--config={file}"))
