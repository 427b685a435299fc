"""Error messages about arguments, in one line that names the bad value and the valid ones.

jsonargparse reports every type that it has tried, over many lines. Its messages are rewritten here if their form is
known, and left as they are if not.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

from lightning_optim._commands import COMMANDS
from lightning_optim.cli.configure import ParamGroupOptions
from lightning_optim.hints import closest, did_you_mean

#: ``hint(option, name)`` says what to write instead of an unknown name.
Hint = Callable[[str, str], str]

_PARSER_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS_PATH = re.compile(r"(?:given class_path |class_path=)'([^']+)'")
_NO_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_NO_KEY = re.compile(r"(Group|Subcommand) '([^']+)' does not accept option '([^']+)'")
_REQUIRED = re.compile(r"the following arguments are required: (.*)")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)
_NO_IMPORT = re.compile(
    r"given class_path '([^']+)':\s+(No module named '[^']+'|module '([^']+)' has no attribute '[^']+')"
)
_NO_NAME = re.compile(r"Expected a dot import path string: ([^\s.]+)$", re.MULTILINE)
_HELP = re.compile(r"--(\w+)\.help: Expected a dot import path string: ([^\s.]+)$", re.MULTILINE)
_SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
_GIVEN = re.compile(r"^\s*Given value: (.*?)(?:\. Got value: .*)?$", re.MULTILINE)
_EXPECTED = re.compile(r"^\s*(Expected .*?)\. Got value: (.*)$", re.MULTILINE)
_OWN_WORDS = re.compile(r"^\s*- (.* has no option .*; valid: .*)$", re.MULTILINE)

#: If no class was named, jsonargparse takes the abstract one.
_NAMELESS = ("torch.optim.Optimizer", "torch.optim.lr_scheduler.LRScheduler")


def in_one_line(message: str, keys: Iterable[str], hint: Hint) -> str:
    """Rewrite an error message of jsonargparse in one line.

    Args:
        message: The message.
        keys: All keys of the parser: ``"optimizer"``, ``"trainer.max_steps"``, ...
        hint: Says what may be meant by a bare name.

    Returns:
        One line; or the message itself, if its form is not known.

    >>> in_one_line("unrecognized arguments: --trainer.max_step 3", ["trainer.max_steps"], lambda option, name: "")
    "unknown option --trainer.max_step (did you mean '--trainer.max_steps'?)"
    """
    for read in _READERS:
        if (line := read(message, list(keys), hint)) is not None:
            return line
    return message


def _of_help(message: str, keys: list[str], hint: Hint) -> str | None:
    found = _HELP.search(message)
    return hint(found[1], found[2]) or None if found else None


def _of_required(message: str, keys: list[str], hint: Hint) -> str | None:
    found = _REQUIRED.match(message)
    if found is None:
        return None
    return f"missing: {', '.join(f'--{_without_command(key)}' for key in found[1].split(', '))}"


def _of_unrecognized(message: str, keys: list[str], hint: Hint) -> str | None:
    """The message for unknown flags."""
    found = _UNRECOGNIZED.match(message)
    flags = [word.partition("=")[0] for word in found[1].split() if word.startswith("--")] if found else []
    return f"unknown option {flags[0]}{_meant(flags[0].removeprefix('--'), keys, '--')}" if flags else None


def _of_unknown_key(message: str, keys: list[str], hint: Hint) -> str | None:
    """The message for unknown keys in a file."""
    found = _NO_KEY.search(message)
    if found is None:
        return None
    key = _without_command(f"{found[2]}.{found[3]}") if found[1] == "Group" else found[3]
    return f"unknown key {key!r}{_meant(key, keys, '')}"


def _of_unknown_option(message: str, keys: list[str], hint: Hint) -> str | None:
    """The message for an option that a class does not have."""
    found = _NO_OPTION.search(message)
    if found is None:
        return None
    before, after = message[: found.start()], message[found.end() :].partition("\n")[0]
    at, own = ".".join(_keys(before)), found[1]
    classes = _CLASS_PATH.findall(after) or _CLASS_PATH.findall(before)
    if not classes:
        return f"unknown key {own!r}{_meant(_without_command(own), keys, '')}"
    if classes[-1] in _NAMELESS:
        return f"--{at}.{own} without a class: give --{at} NAME before it (`lightning-optim list` shows the names)"
    if (cls := _import(classes[-1])) is None:
        return None
    valid = _options(cls)
    owner = f"--{at}" if cls.__module__ == ParamGroupOptions.__module__ else f"--{at} {classes[-1]}"
    return f"{owner} has no option {own!r}{did_you_mean(own, valid)}; valid: {', '.join(valid)}"


def _of_import(message: str, keys: list[str], hint: Hint) -> str | None:
    """The message for a full path at which there is nothing."""
    found = _NO_IMPORT.search(message)
    if found is None:
        return None
    path, reason, module = found[1], found[2], found[3]
    meant = ""
    if module is not None and (home := _import(module)) is not None:
        classes = [name for name in dir(home) if inspect.isclass(getattr(home, name))]
        meant = did_you_mean(path.rpartition(".")[2], classes)
    return f"--{'.'.join(_keys(message))} {path}: {reason}{meant}"


def _of_name(message: str, keys: list[str], hint: Hint) -> str | None:
    """The message for an unknown bare name where a class is wanted."""
    found, at = _NO_NAME.search(message), _keys(message)
    if found is None or _SUBTYPES.findall(message)[1:]:  # within a value that may be of other types
        return None
    return hint(at[0], found[1]) or None if at else None


def _of_value(message: str, keys: list[str], hint: Hint) -> str | None:
    """The message for a value of a wrong type."""
    own = _OWN_WORDS.search(message)
    if own is not None:
        return own[1]
    expected = _EXPECTED.search(message)
    at = _keys(message)
    if not at:
        return None
    if expected is not None and not expected[1].startswith("Expected a dot import"):
        kind = _readable(expected[1]).removeprefix("Expected a ")
        return f"--{'.'.join(at)} {expected[2]}; valid: {kind}"
    types, given = _SUBTYPES.findall(message), _GIVEN.findall(message)
    if not types or not given or given[0].startswith("NestedArg"):
        return None
    return f"--{'.'.join(at)} {given[0]}; valid: {_readable(types[-1])}"


def _keys(message: str) -> list[str]:
    """The keys that lead to the subject of a message, without the command."""
    keys = [_without_command(key) for key in _PARSER_KEY.findall(message)]
    return [key for key in keys if key]


def _without_command(key: str) -> str:
    first, _, rest = key.partition(".")
    return rest if first in COMMANDS else key


def _meant(name: str, keys: list[str], dashes: str) -> str:
    """A hint for an unknown key: by the part before its first dot if that is unknown, else by the whole key."""
    known = {_without_command(key) for key in keys}
    heads = {key.partition(".")[0] for key in known}
    head, dot, rest = name.partition(".")
    if dot and head not in heads:
        close = closest(head, heads)
        return f" (did you mean {f'{dashes}{close}.{rest}'!r}?)" if close else ""
    return did_you_mean(dashes + name, [dashes + key for key in known])


def _options(cls: Any) -> list[str]:
    """The names of a class's options, without the parameters or the optimizer that it is made for."""
    named = (p for p in inspect.signature(cls).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return [parameter.name for parameter in named if parameter.name not in ("params", "optimizer")]


def _import(path: str) -> Any:
    """What is at a path; None if there is nothing."""
    try:
        return importlib.import_module(path)
    except ImportError:
        module, _, name = path.rpartition(".")
        try:
            return getattr(importlib.import_module(module), name, None) if module else None
        except ImportError:
            return None


def _readable(types: str) -> str:
    """The types that jsonargparse lists, in the words of a configuration file."""
    words = re.sub(r"<class '([^']+)'>", r"\1", types).replace("NoneType", "null")
    return re.sub(r"typing\.Literal\[([^\]]*)\]", r"\1", words)


#: The order matters: the text of one form may be a part of another's.
_READERS = (
    _of_help,
    _of_required,
    _of_unrecognized,
    _of_unknown_key,
    _of_unknown_option,
    _of_import,
    _of_name,
    _of_value,
)
