"""What the command does before it needs torch, and how long the list of optimizers takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_optim._commands import COMMANDS, only_usage_is_wanted
from lightning_optim.cli.main import main

#: As the installed script has it, and a look at what it has imported.
SCRIPT = """\
import atexit, sys
from lightning_optim.cli.main import main
heavy = {"torch", "torch._dynamo", "lightning", "jsonargparse"} & set(sys.modules)
code = main()
heavy |= {"torch._dynamo"} & set(sys.modules)
print(*sorted(heavy), file=sys.stderr)
sys.exit(code)
"""


def _start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = folder / "lightning-optim"
    script.write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "usage: lightning-optim"),
        (["--version"], 0, "lightning-optim "),
        ([], 2, "usage: lightning-optim"),
        (["lits"], 2, "unknown command 'lits' (did you mean 'list'?); choose one of: fit, "),
    ],
)
def test_without_a_command_torch_is_not_imported(arguments: list[str], code: int, said: str, tmp_path: Path) -> None:
    done = _start(tmp_path, *arguments)
    assert done.returncode == code, done.stderr
    assert said in (done.stdout if code == 0 or not arguments else done.stderr)
    assert done.stderr.splitlines()[-1] == "", "none of the heavy modules is there"


def test_as_a_module_neither() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lightning_optim", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("usage: lightning-optim")
    assert "torch" not in done.stderr


def test_the_list_needs_torch_but_not_its_compiler(tmp_path: Path) -> None:
    """Which takes longer to import than all else together."""
    read, write = os.pipe()
    os.close(read)  # as of `| head -1`, when it has seen enough
    script = tmp_path / "lightning-optim"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), "list"], stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=120
    )
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == "torch\n", "there is no traceback, and torch._dynamo is not there"


@pytest.mark.parametrize("command", COMMANDS)
def test_with_a_command_the_package_is_whole(command: str) -> None:
    assert not only_usage_is_wanted(["/bin/lightning-optim", command], ["python", "/bin/lightning-optim", command])


def test_another_program_has_the_whole_package() -> None:
    assert not only_usage_is_wanted(["/bin/train.py", "--help"], ["python", "/bin/train.py", "--help"])
    assert not only_usage_is_wanted(["lightning-optim"], ["python", "/bin/train.py"]), (
        "a program that sets its own argv"
    )
    assert not only_usage_is_wanted([], ["python"])


def test_options_before_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """LightningCLI's ``--config FILE fit``."""
    pytest.importorskip("jsonargparse")
    with pytest.raises(SystemExit):
        main(["--config=/nowhere.yaml", "fit"])
    assert "/nowhere.yaml" in capsys.readouterr().err
