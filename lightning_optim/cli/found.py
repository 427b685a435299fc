"""The training that ``lightning-optim find-lr`` tests: a fit that ends with its range test."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_optim.callbacks import LRFinder
from lightning_optim.cli.names import LR_SCHEDULER, OPTIMIZER
from lightning_optim.cli.optim_cli import OptimCLI

#: Arguments of optimizers and schedules that are learning rates.
_RATES = ("lr", "base_lr", "max_lr", "min_lr", "eta_min", "swa_lr")


class OnlyFinds(LRFinder):
    """A range test after which the fit ends, in the way in which Lightning's tuners end one.

    Attributes:
        shows: Whether there is a progress bar. The Trainer's own is about a training, and not there.
    """

    talks = False  # the command prints the result
    shows = False

    def _has_bar(self, trainer: Trainer) -> bool:
        return self.shows and trainer.is_global_zero

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make the test, and end the fit."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.test is not None:
            raise _TunerExitException


class FindLRCLI(OptimCLI):
    """The command line of ``fit``, up to a range test; without loggers, checkpoints and sanity checks.

    Attributes:
        finder: The callback that makes the test.
    """

    finder: OnlyFinds

    @classmethod
    def tested(cls, arguments: Sequence[str], options: argparse.Namespace) -> FindLRCLI:
        """Make the range test of a training.

        Args:
            arguments: The arguments of ``lightning-optim fit``.
            options: The arguments of ``lightning-optim find-lr``.

        Raises:
            ValueError: An option is not valid, or the training cannot be tested.
        """
        finder = OnlyFinds(options.min_lr, options.max_lr, options.steps, False, options.method, options.mode)
        cli = cls(
            args=list(arguments),
            run=False,
            save_config_callback=None,
            parser_kwargs={"prog": "lightning-optim find-lr"},
        )
        cli.finder = finder
        if options.write is not None and cli._get(cli.config, OPTIMIZER) is None:
            raise ValueError(
                f"--write with an optimizer of {type(cli.model).__name__}'s own: only its code can change its lr; "
                f"valid: --{OPTIMIZER}, or no --write"
            )
        trainer: Any = cli.trainer
        finder.shows = trainer.progress_bar_callback is not None
        left_out = Checkpoint | LRFinder | ProgressBar | ModelSummary
        others = [one for one in trainer.callbacks if not isinstance(one, left_out)]
        trainer.callbacks = [*others, finder]
        trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        trainer.num_sanity_val_steps = 0
        trainer.fit(cli.model, datamodule=cli.datamodule)
        if finder.test is None:
            raise ValueError(
                "no batch was trained; valid: a training of at least one step, without --trainer.fast_dev_run"
            )
        return cli

    def after_instantiate_classes(self) -> None:
        """Give the model its ``configure_optimizers``, which it may have itself."""
        super().after_instantiate_classes()
        if self._get(self.config, OPTIMIZER) is None and not is_overridden("configure_optimizers", self.model):
            raise ValueError(f"{type(self.model).__name__} has no configure_optimizers of its own: give --{OPTIMIZER}")

    def overlay(self) -> str:
        """A configuration for ``fit`` with the suggested learning rate, to be given after the training's own."""
        test = self.finder.test
        assert test is not None and test.suggestion is not None  # noqa: S101, PT018 # the caller has checked
        factor = test.suggestion / test.reference
        lines: dict[str, Any] = {}
        for key in (OPTIMIZER, LR_SCHEDULER):
            if (spec := self._get(self.config, key)) is None:
                continue
            rates = {name: spec.init_args.get(name) for name in _RATES if name in spec.init_args}
            found = {
                name: float(f"{rate * factor:.3g}")
                for name, rate in rates.items()
                if isinstance(rate, int | float) and rate
            }
            if found:
                lines[key] = {"class_path": spec.class_path, "init_args": found}
        return f"# By a range test of {len(test.lrs)} steps ({test.method}: {test.reason}).\n" + yaml.safe_dump(
            lines, sort_keys=False
        )
