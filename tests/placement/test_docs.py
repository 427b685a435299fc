"""The page about placement shows what the command prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lightning_optim.cli.plan import main

PAGE = Path(__file__).parents[2] / "docs" / "placement.md"


def test_the_example_is_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PAGE.read_text()
    machine = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    shown = re.search(r"```\n\$ lightning-optim plan (.*?)\n(.*?)\n```", text, re.DOTALL)
    assert machine is not None
    assert shown is not None
    (tmp_path / "machine.json").write_text(machine[1])
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(shown[1])) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown[2].splitlines()
