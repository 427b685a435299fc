"""The console command ``lightning-optim``."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence

from lightning_optim._version import __version__

TRAINER_COMMANDS = {
    "fit": "train a model",
    "validate": "evaluate it on the validation data",
    "test": "evaluate it on the test data",
    "predict": "run it on the prediction data",
}

USAGE = """\
usage: lightning-optim [--help | --version] COMMAND ...

{commands}

`lightning-optim COMMAND --help` explains a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if command == "--version":
        print(f"lightning-optim {__version__}")
        return 0
    if command in TRAINER_COMMANDS:
        return _run_trainer(arguments)
    if command in _COMMANDS:
        return _COMMANDS[command][1](arguments[1:])
    known = ", ".join((*TRAINER_COMMANDS, *_COMMANDS))
    print(f"lightning-optim: unknown command {command!r}; choose one of: {known}", file=sys.stderr)
    return 2


def _list(arguments: Sequence[str]) -> int:
    from lightning_optim.cli.listing import main as run

    return run(arguments)


def _doctor(arguments: Sequence[str]) -> int:
    from lightning_optim.cli.doctor import main as run

    return run(arguments)


def _plan(arguments: Sequence[str]) -> int:
    from lightning_optim.cli.plan import main as run

    return run(arguments)


_COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "list": ("show the optimizers and schedules", _list),
    "doctor": ("show what this machine can do, and which engine is chosen", _doctor),
    "plan": ("choose where the optimizer's step runs: on the device, or in host memory", _plan),
}


def _usage() -> str:
    described = TRAINER_COMMANDS | {name: text for name, (text, _) in _COMMANDS.items()}
    return USAGE.format(commands="\n".join(f"  {name:<10}{text}" for name, text in described.items()))


def can_use_lightning(command: str) -> bool:
    """Prepare for a command that takes LightningCLI's flags; say what is missing for it, if anything is."""
    missing = [name for name in ("lightning", "jsonargparse") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"lightning-optim {command} needs {' and '.join(missing)}: pip install 'lightning-optim[cli]'",
            file=sys.stderr,
        )
        return False
    # `--model my_project.Model` is looked up from the current folder, as under `python -m`: the console script's
    # own folder is what Python would put there.
    if not sys.flags.safe_path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    from lightning_optim.cli.quiet import quiet_lightning

    quiet_lightning()
    return True


def _run_trainer(arguments: list[str]) -> int:
    if not can_use_lightning(arguments[0]):
        return 1
    from lightning_optim.cli.optim_cli import OptimCLI

    OptimCLI(args=arguments, parser_kwargs={"prog": "lightning-optim"})
    return 0
