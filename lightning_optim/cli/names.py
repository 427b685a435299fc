"""Bare names on the command line: ``--optimizer AdamW`` means ours under ``lightning-optim``.

Under any other LightningCLI, ``Adam``, ``AdamW`` and ``SGD`` are torch's, and must stay so. Our classes of those
names therefore have another ``__name__``, and jsonargparse does not find them by the familiar one. Here a bare
name of ours becomes its full path before jsonargparse sees it, in arguments and in configuration files alike. A
full path (``torch.optim.AdamW``) is left as it is, and a name that is not ours (``RMSprop``) is left to
jsonargparse, which finds torch's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from lightning_optim._commands import TRAINER_COMMANDS
from lightning_optim.hints import closest

OPTIMIZER = "optimizer"
LR_SCHEDULER = "lr_scheduler"

#: The name of an environment variable: a prefix, perhaps a command, and one of the two options. An option of the same
#: name that a model may have does not match.
_VARIABLE = re.compile(
    rf"(?:(?!__).)*_(?:(?:{'|'.join(TRAINER_COMMANDS)})__)?({OPTIMIZER}|{LR_SCHEDULER})", re.IGNORECASE
)


class ShortNames:
    """Resolves bare names to full paths.

    Args:
        optimizers: Path of each optimizer, by its name: ``{"AdamW": "lightning_optim.AdamW"}``.
        schedulers: The same for schedules.

    Example:
        >>> names = ShortNames({"AdamW": "lightning_optim.AdamW"}, {"Cosine": "lightning_optim.Cosine"})
        >>> names.in_arguments(["--optimizer", "AdamW", "--optimizer.lr=1e-3", "--lr_scheduler=cosine"])
        ['--optimizer', 'lightning_optim.AdamW', '--optimizer.lr=1e-3', '--lr_scheduler=lightning_optim.Cosine']
        >>> names.in_config({"optimizer": {"class_path": "AdamW"}, "model": {"optimizer": "AdamW"}})
        {'optimizer': {'class_path': 'lightning_optim.AdamW'}, 'model': {'optimizer': 'AdamW'}}
    """

    def __init__(self, optimizers: Mapping[str, str], schedulers: Mapping[str, str]) -> None:
        self._optimizers = dict(optimizers)
        # The two options ignore the case of a name: `lightning-optim list` prints it in another case than the class's.
        self._options = {
            OPTIMIZER: {name.lower(): path for name, path in optimizers.items()},
            LR_SCHEDULER: {name.lower(): path for name, path in schedulers.items()},
        }

    def in_arguments(self, arguments: Iterable[str]) -> list[str]:
        """Command line arguments with the bare names of the two options resolved."""
        resolved: list[str] = []
        waiting = ""  # the flag before this argument, if its value is still to come
        for argument in arguments:
            if argument.startswith("--"):
                flag, equals, value = argument.partition("=")
                resolved.append(f"{flag}={self._argument(flag, value)}" if equals else argument)
                waiting = "" if equals else flag
            else:
                resolved.append(self._argument(waiting, argument))
                waiting = ""
        return resolved

    def in_config(self, config: Any) -> Any:
        """A whole configuration, with subcommands or without, with the bare names in it resolved."""
        config = self.in_value(config)
        if not isinstance(config, dict):
            return config
        resolved = self._options_in(config)
        for subcommand in TRAINER_COMMANDS.keys() & resolved.keys():
            resolved[subcommand] = self._options_in(resolved[subcommand])
        return resolved

    def in_environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Environment variables, with a bare name in those of the two options (``PL_FIT__OPTIMIZER``) resolved."""
        resolved = dict(variables)
        for variable, value in variables.items():
            if (found := _VARIABLE.fullmatch(variable)) is not None:
                resolved[variable] = self._options[found[1].lower()].get(value.lower(), value)
        return resolved

    def in_value(self, value: Any) -> Any:
        """Any part of a configuration, with each ``class_path`` that is the name of an optimizer of ours resolved."""
        if isinstance(value, list):
            return [self.in_value(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            key: self._optimizers.get(item, item)
            if key == "class_path" and isinstance(item, str)
            else self.in_value(item)
            for key, item in value.items()
        }

    def hint(self, option: str, name: str) -> str:
        """What to write instead of a bare name that was not found; empty for other options."""
        known = self._options.get(option)
        if known is None:
            return ""
        close = closest(name, known)
        meant = f" Did you mean {close!r}?" if close else ""
        return (
            f"There is no {option} {name!r}.{meant} Bare names are those of `lightning-optim list` and of torch;"
            " others are written as a full path."
        )

    def _argument(self, flag: str, value: str) -> str:
        option, _, rest = flag.removeprefix("--").partition(".")
        if option in self._options and rest in ("", "class_path", "help"):
            return self._options[option].get(value.lower(), value)
        # `--optimizer.base AdamW`: an optimizer inside another one
        return self._optimizers.get(value, value) if option == OPTIMIZER else value

    def _options_in(self, config: Any) -> Any:
        if not isinstance(config, dict):
            return config
        return {
            key: self._option(self._options[key], value) if key in self._options else value
            for key, value in config.items()
        }

    def _option(self, names: Mapping[str, str], value: Any) -> Any:
        if isinstance(value, str):
            return names.get(value.lower(), value)
        if isinstance(value, dict) and isinstance(value.get("class_path"), str):
            return value | {"class_path": names.get(value["class_path"].lower(), value["class_path"])}
        return value


def exported_names(cls: type) -> list[str]:
    """The names under which ``lightning_optim`` offers a class, the familiar one first.

    Example:
        >>> import lightning_optim
        >>> exported_names(lightning_optim.AdamW)
        ['AdamW', 'AdamWOptim']
    """
    import lightning_optim

    names = [name for name, value in vars(lightning_optim).items() if value is cls]
    return sorted(names, key=len)


@cache
def short_names() -> ShortNames:
    """The names of the registry."""
    from lightning_optim import registry

    optimizers = [registry.optimizer_info(name).cls for name in registry.list_optimizers()]
    schedulers = [registry.scheduler_info(name).cls for name in registry.list_schedulers()]
    return ShortNames(_paths(optimizers), _paths(schedulers))


def _paths(classes: Iterable[type]) -> dict[str, str]:
    return {name: f"lightning_optim.{name}" for cls in classes for name in exported_names(cls)}
