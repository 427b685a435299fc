"""The command ``lightning-optim``: usage, help, list, doctor, and what works without Lightning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

import lightning_optim
from lightning_optim import registry
from lightning_optim.cli import main as cli_main
from lightning_optim.cli.main import main
from lightning_optim.cli.optim_cli import OptimCLI
from lightning_optim.engines import ENGINES

from .common import MODULE, QUIET, known_warnings

pytestmark = known_warnings


def test_help_of_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["fit", "--optimizer.help", "adamw"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert "lightning_optim.AdamW" in printed
    assert "--optimizer.max_grad_norm" in printed


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-optim {lightning_optim.__version__}\n"


def test_an_unknown_command_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    message = capsys.readouterr().err
    assert "'train'" in message
    assert "fit, validate, test, predict, list, doctor" in message


def test_modules_of_the_current_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project_of_a_user.py").write_text(f"import {MODULE}\n\nclass Mine({MODULE}.Model):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert main(["fit", "--model=project_of_a_user.Mine", "--trainer.max_steps=1", *QUIET, "--optimizer=Lion"]) == 0
    assert sys.path[0] == str(tmp_path)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in known["optimizers"]] == registry.list_optimizers()
    assert [entry["name"] for entry in known["schedulers"]] == registry.list_schedulers()
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for entry in (*known["optimizers"], *known["schedulers"]):
        assert entry["summary"] in printed
        assert getattr(lightning_optim, entry["class"])
    columns = {line.index("elementwise") for line in printed.splitlines() if "elementwise" in line}
    assert len(columns) == 1, "the columns are aligned"


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTNING_OPTIM_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setenv("LIGHTNING_OPTIM_THREADS", "many")
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["engines"]) == set(ENGINES)
    assert "many" in facts["threads"]["host engine"], "a bad setting is reported, not raised"
    for weights in ("float32 on CPU", "bfloat16 on CPU"):
        assert any(engine in facts["auto"][weights] for engine in facts["engines"])
    assert facts["kernel cache"]["folder"] == str(tmp_path / "kernels")
    monkeypatch.delenv("LIGHTNING_OPTIM_THREADS")
    assert main(["doctor"]) == 0
    assert "kernel cache:" in capsys.readouterr().out


@pytest.mark.parametrize(("mode", "state"), [(0o700, "0 kernels"), (0o777, "others can write to it")])
def test_doctor_looks_at_the_cache_folder(
    mode: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_optim.cli.doctor import kernel_cache

    monkeypatch.setenv("LIGHTNING_OPTIM_CACHE", str(tmp_path / "kernels"))
    assert "not there yet" in kernel_cache()["state"]
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(mode)
    assert state in kernel_cache()["state"]


def test_without_lightning_the_other_commands_work() -> None:
    code = (
        "import sys; sys.modules['lightning'] = None; sys.modules['jsonargparse'] = None\n"
        "from lightning_optim.cli.main import main\n"
        "codes = [main(['list']), main(['doctor', '--json']), main(['fit'])]\n"
        "sys.exit(codes != [0, 0, 1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'lightning-optim[cli]'" in done.stderr


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_optim", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"lightning-optim {lightning_optim.__version__}\n"


def test_the_usage_names_every_subcommand_of_the_cli() -> None:
    assert set(cli_main.TRAINER_COMMANDS) == set(OptimCLI.subcommands())
