"""``lightning-optim fit`` and its siblings: LightningCLI with optimization that works by flags alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace, get_loader, set_loader
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_optim.cli.complaints import in_one_line
from lightning_optim.cli.configure import Interval, OptimizerOptions, ParamGroupOptions
from lightning_optim.cli.exchanged import exchanges
from lightning_optim.cli.faults import of_strategy
from lightning_optim.cli.names import LR_SCHEDULER, OPTIMIZER, short_names
from lightning_optim.strategy_names import register

PARSER_MODE = "lightning_optim_yaml"
"""The jsonargparse mode of our parsers: YAML in which bare names of ours are resolved."""


def _load(text: str) -> Any:
    return short_names().in_value(get_loader("yaml")(text))


register()  # `--trainer.strategy in_graph`
set_loader(PARSER_MODE, _load, exceptions=(yaml.YAMLError,))


class OptimParser(LightningArgumentParser):
    """A LightningArgumentParser that resolves bare names of ours.

    Attributes:
        files: The configurations that it has read, in their order.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.files: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Report an error; if it ends the program and its form is known, in one line."""
        if self.exit_on_error:  # parsers of classes within this one do not exit
            message = in_one_line(message, self._keys(), short_names().hint)
        super().error(message, ex)

    def _load_env_vars(self, env: Mapping[str, str], defaults: bool) -> Namespace:
        return super()._load_env_vars(short_names().in_environment(env), defaults)

    def print_usage(self, file: Any = None) -> None:
        """Print one line: LightningCLI's whole usage has a hundred lines, below which nobody finds an error."""
        print(f"usage: {self.prog.replace(' [options]', '')} [options]", file=file)

    def _keys(self) -> set[str]:
        """The keys of this parser and of those of its commands."""
        keys = {action.dest for action in self._actions}
        for commands in (action.choices for action in self._actions if isinstance(action.choices, dict)):
            keys |= {action.dest for parser in commands.values() for action in parser._actions}
        return keys

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        """Parse a configuration given as text; files come through here too."""
        try:
            loaded = get_loader("yaml")(content)
        except yaml.YAMLError:
            return super().parse_string(content, *args, **kwargs)  # this reports the error
        if isinstance(loaded, dict):
            loaded = short_names().in_config(loaded)
            self.files.append(loaded)
            # Quoted and tagged, so that what is read again is of the same type: "1e-3" in quotes stays a string.
            content = yaml.safe_dump(loaded, sort_keys=False, default_style='"')
        return super().parse_string(content, *args, **kwargs)


class OptimCLI(LightningCLI):
    """LightningCLI that knows our names, splits parameters, and steps schedules per optimizer step.

    Differences from the stock class:

    - ``--optimizer AdamW`` is ours; ``--optimizer torch.optim.AdamW`` is torch's.
    - Schedules step per optimizer step. ``--lr_interval epoch`` brings the stock behaviour back.
    - ``--param_groups.layer_decay 0.75`` and its siblings split the parameters.
    - The optimizer is built when the Trainer asks for it, so that layers made in ``configure_model`` are in it.

    Args:
        *args: See ``LightningCLI``. With no model class, ``--model`` takes any.
        **kwargs: See ``LightningCLI``. ``auto_configure_optimizers=False`` leaves all of the above out.

    Example:
        A script of one's own, with a model class fixed::

            from lightning_optim.cli.optim_cli import OptimCLI

            OptimCLI(MyModel, MyData, seed_everything_default=1)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._automatic = kwargs.pop("auto_configure_optimizers", True)
        kwargs.setdefault("parser_class", OptimParser)
        kwargs["auto_configure_optimizers"] = False  # what it would add is added here
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose configuration files are read with bare names resolved."""
        return super().init_parser(parser_mode=PARSER_MODE, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--optimizer``, ``--lr_scheduler``, ``--lr_interval`` and ``--param_groups``."""
        if not self._automatic:
            return
        parser.add_optimizer_args(nested_key=OPTIMIZER)
        parser.add_lr_scheduler_args(nested_key=LR_SCHEDULER)
        parser.add_argument(
            "--lr_interval",
            type=Interval | None,
            default=None,
            help="When the schedule steps; by default at each optimizer step (ReduceLROnPlateau: each epoch).",
        )
        parser.add_argument(
            "--param_groups",
            type=ParamGroupOptions | None,
            default=None,
            help="Split the parameters into groups; biases and norms are then not decayed.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what was given, with bare names resolved."""
        names = short_names()
        if args is None or isinstance(args, list | tuple):
            self.config = parser.parse_args(names.in_arguments(sys.argv[1:] if args is None else args))
        else:
            self.config = parser.parse_object(args if isinstance(args, Namespace) else names.in_config(dict(args)))

    def _tell_of_exchanges(self) -> None:
        chosen = {key: self._get(self.config, key) for key in (OPTIMIZER, LR_SCHEDULER)}
        # Without `run` there are no commands.
        parsers = (self.parser, *getattr(self, "_subcommand_parsers", {}).values())
        for line in exchanges(
            [file for parser in parsers if isinstance(parser, OptimParser) for file in parser.files],
            {key: spec.as_dict() if isinstance(spec, Namespace) else None for key, spec in chosen.items()},
        ):
            rank_zero_info(line)

    def instantiate_classes(self) -> None:
        """Make data, model and Trainer."""
        if self._automatic:
            self._tell_of_exchanges()
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; if its strategy's name is wrong, the error lists our names, too."""
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:
            if (better := of_strategy(str(error))) is None:
                raise
            raise ValueError(better) from None

    def after_instantiate_classes(self) -> None:
        """Give the model its ``configure_optimizers``, when there is an ``--optimizer``."""
        if not self._automatic:
            return
        chosen = {
            key: self._get(self.config_init, key) for key in (OPTIMIZER, LR_SCHEDULER, "param_groups", "lr_interval")
        }
        if chosen[OPTIMIZER] is None:
            for key, value in chosen.items():
                if value is not None:
                    self.parser.error(f"--{key} is of no use without --{OPTIMIZER}")
            if self.subcommand == "fit" and not is_overridden("configure_optimizers", self.model):
                self.parser.error(
                    f"{type(self.model).__name__} has no configure_optimizers of its own: give --{OPTIMIZER},"
                    " for example --optimizer AdamW (`lightning-optim list` shows them)"
                )
            return
        options = OptimizerOptions(
            optimizer=_as_dict(chosen[OPTIMIZER]),
            lr_scheduler=chosen[LR_SCHEDULER] and _as_dict(chosen[LR_SCHEDULER]),
            groups=chosen["param_groups"],
            interval=chosen["lr_interval"],
        )
        options.check()
        options.attach(self.model)


def _as_dict(spec: Namespace) -> dict[str, Any]:
    """``class_path`` and ``init_args`` as plain dictionaries (``dict(namespace)`` would join their keys by dots)."""
    return spec.as_dict()
