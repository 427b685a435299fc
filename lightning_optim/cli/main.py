"""The console command ``lightning-optim``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lightning_optim._commands import COMMANDS, TRAINER_COMMANDS, command_of
from lightning_optim._version import __version__
from lightning_optim.hints import did_you_mean

USAGE = """\
usage: lightning-optim [--help | --version] COMMAND ...

{commands}

`lightning-optim COMMAND --help` explains a command."""

#: A variable of jsonargparse, which asks for the traceback of an error in the arguments, here too.
DEBUG_VARIABLE = "JSONARGPARSE_DEBUG"

#: The exit codes of a program that was ended by Ctrl-C, or because nobody reads its output.
INTERRUPTED, BROKEN_PIPE = 128 + 2, 128 + 13


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        The exit code: 2 for arguments that are not valid.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = command_of(arguments)
    try:
        if command in TRAINER_COMMANDS:
            return _run_trainer(command, arguments)
        code = _run_own(command, arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("lightning-optim: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if command in TRAINER_COMMANDS:  # a training may have pipes of its own
            raise
        # `lightning-optim list | head -1`. What is left of the output must not fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code


def _run_own(command: str | None, arguments: list[str]) -> int:
    """Run a command without a Trainer, or handle arguments that name no command."""
    if command == "list":
        from lightning_optim.cli.listing import main as run
    elif command == "doctor":
        from lightning_optim.cli.doctor import main as run
    elif command == "find-lr":
        from lightning_optim.cli.find_lr import main as run
    elif command == "plan":
        from lightning_optim.cli.plan import main as run
    else:
        return _without_command(arguments)
    return run(arguments[1:])


def _without_command(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())))
        return 0 if arguments else 2
    if first == "--version":
        print(f"lightning-optim {__version__}")
        return 0
    hint, known = did_you_mean(first, COMMANDS), ", ".join(COMMANDS)
    print(f"lightning-optim: unknown command {first!r}{hint}; choose one of: {known}", file=sys.stderr)
    return 2


def _run_trainer(command: str, arguments: list[str]) -> int:
    from lightning_optim.cli.with_lightning import can_use_lightning

    if not can_use_lightning(command):
        return 1
    from lightning_optim.cli.faults import in_words, is_of_the_user
    from lightning_optim.cli.optim_cli import OptimCLI

    try:
        OptimCLI(args=arguments, parser_kwargs={"prog": "lightning-optim"})
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE, "").lower() == "true" or not is_of_the_user(error):
            raise
        print(f"lightning-optim {command}: error: {in_words(error)}", file=sys.stderr)
        return 2
    return 0
