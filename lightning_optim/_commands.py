"""The commands of ``lightning-optim``, and what can be said about them without torch, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

#: Those of LightningCLI.
TRAINER_COMMANDS = {
    "fit": "train a model",
    "validate": "evaluate it on the validation data",
    "test": "evaluate it on the test data",
    "predict": "run it on the prediction data",
}

OWN_COMMANDS = {
    "list": "show the optimizers and schedules",
    "doctor": "show what this machine can do, and which engine is chosen",
    "find-lr": "find a learning rate for a training by a range test",
    "plan": "choose where the optimizer's step runs: on the device, or in host memory",
}

COMMANDS = TRAINER_COMMANDS | OWN_COMMANDS


def command_of(arguments: Sequence[str]) -> str | None:
    """The command among the arguments of ``lightning-optim``; None if there is none.

    It is the first argument. LightningCLI's options may stand before its own: ``--config file.yaml fit``.

    >>> command_of(["plan", "--weights", "7e9"]), command_of(["--config", "file.yaml", "fit"]), command_of(["--help"])
    ('plan', 'fit', None)
    """
    first = arguments[0] if arguments else ""
    if first in COMMANDS:
        return first
    if first.startswith("-") and first not in ("-h", "--help", "--version"):
        return next((argument for argument in arguments if argument in TRAINER_COMMANDS), None)
    return None


def only_usage_is_wanted(argv: Sequence[str], orig_argv: Sequence[str]) -> bool:
    """Whether this process is ``lightning-optim`` without a command: ``--help``, ``--version``, or a mistake.

    Args:
        argv: ``sys.argv``, while the package is being imported.
        orig_argv: ``sys.orig_argv``.

    >>> only_usage_is_wanted(["/usr/bin/lightning-optim", "--help"], ["python", "/usr/bin/lightning-optim", "--help"])
    True
    >>> only_usage_is_wanted(["-m", "--help"], ["python", "-m", "lightning_optim", "--help"])
    True
    >>> only_usage_is_wanted(["-m", "--help"], ["python", "-m", "pytest", "--help"])
    False
    """
    started = orig_argv[-len(argv) :]
    if not argv or started[1:] != argv[1:] or command_of(argv[1:]) is not None:
        return False
    if argv[0] == "-m":  # so it is until the module is found
        return started[0].removeprefix("-m") == "lightning_optim"
    return started[0] == argv[0] and Path(argv[0]).name == "lightning-optim"
