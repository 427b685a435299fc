"""The training that ``lightning-optim plan`` plans: model and optimizer from the flags and files of ``fit``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightning_optim.cli.configure import OptimizerOptions, configure_optimizers
from lightning_optim.cli.names import LR_SCHEDULER, OPTIMIZER
from lightning_optim.cli.optim_cli import OptimCLI
from lightning_optim.placement.footprint import Footprint, footprint

#: What Lightning converts a module to, by the Trainer's precision; with all others weights stay as they were made.
_CONVERTED = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64, "64": torch.float64}

#: Precisions with a loss scale: the gradients are unscaled, and checked.
_SCALED = ("16-mixed", "16")

#: The arguments of the Trainer that decide what is counted; others may be instances, which are not made.
_READ = ("precision", "gradient_clip_val", "accumulate_grad_batches")


class PlanCLI(OptimCLI):
    """The command line of ``fit``, up to the model and its optimizer: on the meta device, without data or Trainer."""

    @classmethod
    def planned(
        cls, arguments: Sequence[str], master_dtype: torch.dtype
    ) -> tuple[Footprint, bool, bool, tuple[str, ...]]:
        """The footprint of a training; whether its gradients are clipped or scaled, and accumulated; and notes.

        Args:
            arguments: The arguments of ``lightning-optim fit``.
            master_dtype: The type of a detached step's masters.

        Raises:
            ValueError: The model or its optimizers cannot be made, or there are several.
        """
        cli = cls(
            args=list(arguments),
            run=False,
            save_config_callback=None,
            parser_kwargs={"prog": "lightning-optim plan"},
        )
        precision = str(cli.read["precision"] or "32-true")  # the Trainer's own default
        clips = bool(cli.read["gradient_clip_val"]) or precision in _SCALED
        batches = int(cli.read["accumulate_grad_batches"] or 1)
        scaled = "with" if clips else "without"
        shown = (
            f"of the Trainer: precision {precision}, {scaled} clipping or a loss scale, {batches} batches a step; not "
            "its devices and strategy: see --ranks and --sharding"
        )
        needed = footprint(cli.model, cli.optimizer(), master_dtype=master_dtype)
        return needed, clips, batches > 1, (*cli.notes, shown)

    def instantiate_classes(self) -> None:
        """Make the model alone."""
        trainer = self.config.pop("trainer")
        self.config["data"] = None
        self.read = {name: trainer.get(name) for name in _READ}
        self.notes: list[str] = []
        try:
            with torch.device("meta"):
                self._make_model()
        except Exception as error:  # anybody's constructor may raise anything
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            self.notes.append(f"the model was made in memory, since it cannot be on the meta device ({reason})")
            self._make_model()

    def _set_seed(self) -> None:
        """Do nothing: no random number matters here."""

    def after_instantiate_classes(self) -> None:
        """Do nothing: see :meth:`optimizer`."""

    def optimizer(self) -> Optimizer:
        """The optimizer of the flags, or else that of the model; without a schedule, which may need the Trainer.

        Raises:
            ValueError: There is none, or there are several, or it needs the Trainer.
        """
        model, spec = self.model, self._get(self.config_init, OPTIMIZER)
        if spec is None:
            if not is_overridden("configure_optimizers", model):
                raise ValueError(f"{type(model).__name__} has no configure_optimizers of its own: give --{OPTIMIZER}")
            try:
                found = _optimizers(model.configure_optimizers())
            except Exception as error:
                raise ValueError(
                    f"{type(model).__name__}.configure_optimizers cannot be called without a Trainer ({error}): give "
                    f"--{OPTIMIZER}"
                ) from error
        else:
            options = OptimizerOptions(spec.as_dict(), groups=self._get(self.config_init, "param_groups"))
            found = _optimizers(configure_optimizers(model, options))
        if len(found) != 1:
            raise ValueError(f"{type(model).__name__} has {len(found)} optimizers; a plan is for one")
        return found[0]

    def _make_model(self) -> None:
        # A schedule may be an instance with a state of its own; it has no part in this.
        config = self.config.clone()
        config[LR_SCHEDULER] = None
        self.config_init = self.parser.instantiate_classes(config)
        model: LightningModule = self._get(self.config_init, "model")
        if is_overridden("configure_model", model):
            model.configure_model()
        if (dtype := _CONVERTED.get(str(self.read["precision"]))) is not None:
            model.to(dtype)
        self.model = model


def _optimizers(configured: Any) -> list[Optimizer]:
    """The optimizers in what ``configure_optimizers`` returned, which may have many forms."""
    if configured is None:
        return []
    if isinstance(configured, dict):
        return [configured["optimizer"]]
    if isinstance(configured, Optimizer):
        return [configured]
    if len(configured) == 2 and all(isinstance(part, list | tuple) for part in configured):
        return list(configured[0])
    return [optimizer for part in configured for optimizer in _optimizers(part)]
