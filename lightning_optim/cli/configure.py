"""From parsed options to an optimizer: what ``configure_optimizers`` of the command line's model does.

It runs when Lightning asks for the optimizer, not when the command line is parsed. By then ``configure_model``
has built its layers and sharding strategies have replaced parameters, which the stock LightningCLI misses.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ReduceLROnPlateau, instantiate_class

from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.optimizers.sam import SAM, built_by
from lightning_optim.param_groups import Kinds, param_groups

Interval = Literal["step", "epoch"]


@dataclass(frozen=True)
class ParamGroupOptions:
    """How to split the model's parameters into groups (see ``lightning_optim.param_groups``).

    Giving any of these splits them: biases, norms and whatever else has at most one dimension are not decayed.
    ``--param_groups {}`` does it with the defaults.

    Args:
        weight_decay: Weight decay of the parameters that are decayed; by default the optimizer's own.
        layer_decay: Factor in (0, 1] on the learning rate, once per layer of distance from the top.
        no_decay: Glob patterns of further parameters without weight decay.
        decay_embeddings: Whether the weights of embeddings are decayed.
        overrides: Options by glob pattern of parameter names, such as ``{"head.*": {"lr": 1e-3}}``.
        include_frozen: Whether parameters with ``requires_grad=False`` are included.
    """

    weight_decay: float | None = None
    layer_decay: float | None = None
    no_decay: list[str] | None = None
    decay_embeddings: bool = True
    overrides: dict[str, dict[str, Any]] | None = None
    include_frozen: bool = False


@dataclass(frozen=True)
class OptimizerOptions:
    """What the command line says about optimization.

    Args:
        optimizer: ``{"class_path": ..., "init_args": {...}}``.
        lr_scheduler: The same for the schedule, if any.
        groups: How to split the parameters; ``None`` makes one group of them.
        interval: When the schedule steps; ``None`` for the default of :func:`schedule_config`.
    """

    optimizer: dict[str, Any]
    lr_scheduler: dict[str, Any] | None = None
    groups: ParamGroupOptions | None = None
    interval: Interval | None = None

    def check(self) -> None:
        """Try the values on a dummy weight, before anything is loaded, or written into a folder.

        Classes that are not ours or torch's are not tried: they may need the param groups that they will get.

        Raises:
            ValueError: The optimizer or the schedule does not take a value.
            TypeError: A value has the wrong type.
        """
        if not all(_is_in(cls, "lightning_optim", "torch.optim") for cls in _classes(self.optimizer)):
            return
        weight = ("weight", torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float32, device="cpu")))
        optimizer = instantiate_class([weight], self.optimizer)
        if self.lr_scheduler is not None and _is_in(_class(self.lr_scheduler), "lightning_optim"):
            instantiate_class(optimizer, self.lr_scheduler)

    def attach(self, model: LightningModule) -> None:
        """Make these options the model's ``configure_optimizers``."""
        # Lightning looks through a `partial` when it asks whether the method is overridden.
        model.configure_optimizers = partial(configure_optimizers, model, self)  # type: ignore[method-assign, assignment]


def configure_optimizers(model: LightningModule, options: OptimizerOptions) -> dict[str, Any]:
    """Build the optimizer and the schedule over the parameters that the model has now.

    Args:
        model: The model, whose layers are built.
        options: What to build.

    Returns:
        What ``LightningModule.configure_optimizers`` may return.
    """
    optimizer = instantiate_class(_parameters(model, options), options.optimizer)
    if options.lr_scheduler is None:
        return {"optimizer": optimizer}
    scheduler = instantiate_class(optimizer, options.lr_scheduler)
    return {"optimizer": optimizer, "lr_scheduler": schedule_config(scheduler, options.interval)}


def schedule_config(scheduler: Any, interval: Interval | None = None) -> dict[str, Any]:
    """How Lightning is to step a schedule.

    The stock LightningCLI steps every schedule once per epoch, which makes a warmup of 100 steps last 100 epochs.
    Here it is once per optimizer step, except for ``ReduceLROnPlateau``, which waits for its metric.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        return {"scheduler": scheduler, "interval": interval or "epoch", "monitor": scheduler.monitor}
    return {"scheduler": scheduler, "interval": interval or "step"}


def _parameters(model: LightningModule, options: OptimizerOptions) -> Any:
    kinds = _kinds(options.optimizer)
    if options.groups is None:
        # Our optimizers that step several kinds of parameters tell these apart by name.
        return model.parameters() if kinds is None else model.named_parameters()
    known = _arguments(options.optimizer)
    chosen = asdict(options.groups)
    decays = "weight_decay" in known
    if chosen["weight_decay"] is None:
        chosen["weight_decay"] = known["weight_decay"] if decays else 0.0
    elif not decays:
        raise ValueError(f"{options.optimizer['class_path']} has no weight_decay, so param_groups cannot set it")
    groups = param_groups(model, lr=known.get("lr"), kinds=kinds, **chosen)
    if not decays:
        for group in groups:
            del group["weight_decay"]
    return groups


def _is_in(cls: Any, *packages: str) -> bool:
    home = f"{getattr(cls, '__module__', '')}."
    return home.startswith(tuple(f"{package}." for package in packages))


def _classes(spec: dict[str, Any]) -> tuple[Any, Any]:
    """The class of an optimizer, and the class of the optimizer in it; if there is none, its own class twice."""
    return _class(spec), _stepped(spec)[0]


def _class(spec: dict[str, Any]) -> Any:
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def _kinds(spec: dict[str, Any]) -> Kinds | None:
    """The kinds of parameters that an optimizer of ours tells apart; None for others."""
    cls, _ = _stepped(spec)
    ours = isinstance(cls, type) and issubclass(cls, RuleOptimizer)
    return cls.kinds(_arguments(spec)) if ours else None


def _arguments(spec: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the class of :func:`_stepped` will get, its own defaults included."""
    cls, given = _stepped(spec)
    if cls is None:
        base = spec["init_args"]["base"]
        raise ValueError(f"param_groups with base={base!r}, whose options are not known; valid: an optimizer's class")
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return defaults | given


def _stepped(spec: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class whose options param groups have (None if it is not known), and the arguments given for it."""
    cls, given = _class(spec), spec.get("init_args", {})
    return built_by(given["base"]) if cls is SAM else (cls, given)
