"""All optimizers and schedules by name, which the CLI lists and the tests run through.

A new optimizer is one file in ``optimizers/`` and one line in its ``__init__.py``; its key here is its name in lower
case.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lightning_optim.hints import did_you_mean
from lightning_optim.optimizers import EXPORTED, RuleOptimizer
from lightning_optim.optimizers.sam import built_by
from lightning_optim.param_groups import param_groups
from lightning_optim.schedulers import WSD, Cosine, Linear, Schedule
from lightning_optim.stepping.options import TORCH_SWITCHES
from lightning_optim.stepping.together import plain_update


@dataclass(frozen=True)
class OptimizerInfo:
    """What the registry knows about an optimizer.

    Attributes:
        name: Key for :func:`create_optimizer` and the CLI.
        cls: The class.
        paper: The paper (or page) that defines it.
        torch_equivalent: The class of ``torch.optim`` with which state and results are interchangeable, if any.
    """

    name: str
    cls: type[Any]
    paper: str
    torch_equivalent: type[torch.optim.Optimizer] | None = None

    @classmethod
    def of(cls, optimizer: type[Any]) -> OptimizerInfo:
        """The entry of an optimizer's class; its name is the class's in lower case, without ``Optim``."""
        name = optimizer.__name__.removesuffix("Optim").lower()
        return cls(name, optimizer, optimizer.paper, getattr(optimizer, "torch_equivalent", None))

    @property
    def summary(self) -> str:
        """A description in one line."""
        return _first_line(self.cls)

    @cached_property
    def kind(self) -> str:
        """The kind of its step.

        ``"elementwise"``; ``"reduce"`` if an update depends on a norm or sum over its tensor, or over all tensors;
        ``"matrix"`` if it depends on products of matrices; ``"closure"`` if the step evaluates the model again;
        ``"wrapper"`` if the optimizer is made around another one, which its option ``base`` builds.
        """
        if not _steps_by_a_rule(self.cls):
            return "closure" if _evaluates_the_model(self.cls) else "wrapper"
        if self.cls.matrix_rule is not None:
            return "matrix"
        weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float32, device="cpu"))
        # The options of a group, without making an optimizer, which would import torch's compiler for seconds.
        group = {name: parameter.default for name, parameter in inspect.signature(self.cls).parameters.items()}
        method: Any = self.cls  # it is one
        update = plain_update(method, group, weight, fresh=True, due=True)
        return "reduce" if update.program.reduces or update.program.phases else "elementwise"

    @property
    def create(self) -> Callable[..., RuleOptimizer]:
        """The class as a callable: the subclasses' constructors differ from their base's."""
        return self.cls

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the constructor's arguments after ``params``, without torch's switches, which choose nothing."""
        return tuple(name for name in _arguments(self.cls) if name not in TORCH_SWITCHES)


@dataclass(frozen=True)
class SchedulerInfo:
    """What the registry knows about a schedule.

    Attributes:
        name: Its key.
        cls: The class.
    """

    name: str
    cls: type[Schedule]

    @property
    def summary(self) -> str:
        """A description in one line."""
        return _first_line(self.cls)


def _listed(is_listed: Callable[[type], bool]) -> dict[str, OptimizerInfo]:
    """Some of the optimizers, by name."""
    classes = {cls for cls in EXPORTED.values() if cls is not RuleOptimizer and is_listed(cls)}
    return {info.name: info for info in sorted(map(OptimizerInfo.of, classes), key=lambda info: info.name)}


def _steps_by_a_rule(cls: type) -> bool:
    return issubclass(cls, RuleOptimizer)


def _evaluates_the_model(cls: type) -> bool:
    return not _steps_by_a_rule(cls) and getattr(cls, "needs_closure", False) is True


#: Optimizers that step by a rule, on one engine or another.
OPTIMIZERS: dict[str, OptimizerInfo] = _listed(_steps_by_a_rule)

#: Optimizers whose step calls its closure several times. They are listed and made by name like the others, but kept
#: apart, because what holds for rules (engines, rounding, state per parameter) does not hold for them.
CLOSURE_OPTIMIZERS: dict[str, OptimizerInfo] = _listed(_evaluates_the_model)

#: Optimizers that are made around another one, kept apart for the same reason.
WRAPPERS: dict[str, OptimizerInfo] = _listed(lambda cls: not (_steps_by_a_rule(cls) or _evaluates_the_model(cls)))

SCHEDULERS: dict[str, SchedulerInfo] = {
    info.name: info
    for info in (SchedulerInfo("cosine", Cosine), SchedulerInfo("linear", Linear), SchedulerInfo("wsd", WSD))
}


def list_optimizers() -> list[str]:
    """Names of all optimizers.

    >>> list_optimizers()  # doctest: +NORMALIZE_WHITESPACE
    ['adafactor', 'adam', 'adamw', 'lamb', 'lbfgs', 'lion', 'muon', 'prodigy', 'radam', 'rmsprop', 'sam',
     'schedulefreeadamw', 'sgd', 'soap', 'sophia']
    """
    return sorted({**OPTIMIZERS, **CLOSURE_OPTIMIZERS, **WRAPPERS})


def list_schedulers() -> list[str]:
    """Names of all schedules.

    >>> list_schedulers()
    ['cosine', 'linear', 'wsd']
    """
    return sorted(SCHEDULERS)


def optimizer_info(name: str) -> OptimizerInfo:
    """The registry's entry of an optimizer; upper and lower case make no difference.

    Raises:
        ValueError: No such optimizer.
    """
    return _lookup("optimizer", name, {**OPTIMIZERS, **CLOSURE_OPTIMIZERS, **WRAPPERS})


def scheduler_info(name: str) -> SchedulerInfo:
    """The registry's entry of a schedule; upper and lower case make no difference.

    Raises:
        ValueError: No such schedule.
    """
    return _lookup("schedule", name, SCHEDULERS)


def create_optimizer(
    name: str,
    model: nn.Module | Iterable[Any],
    *,
    layer_decay: float | None = None,
    no_decay: Iterable[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Any:
    """Make an optimizer by name.

    Args:
        name: One of :func:`list_optimizers`.
        model: A module, whose parameters are split by :func:`~lightning_optim.param_groups.param_groups`, or
            parameters or param groups, which are taken as they are.
        layer_decay: For a module: the factor of the learning rate from each layer to the one below it.
        no_decay: For a module: further parameters without weight decay, as name patterns.
        overrides: For a module: options by name pattern.
        options: The optimizer's own options, by name.

    Returns:
        A :class:`~lightning_optim.optimizers.base.RuleOptimizer`; if its kind is ``"closure"`` or ``"wrapper"``,
        another torch optimizer.

    Raises:
        ValueError: No such optimizer, or options for a module without one.
        TypeError: An option that the optimizer does not have, or for a module, a ``base`` whose class is unknown.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    >>> optimizer = create_optimizer("lion", model, lr=1e-4, weight_decay=0.1)
    >>> [(group["name"], group["weight_decay"]) for group in optimizer.param_groups]
    [('decay', 0.1), ('no_decay', 0.0)]
    """
    info = optimizer_info(name)
    for option in options:
        if option not in _arguments(info.cls):
            hint = did_you_mean(option, info.options)
            raise TypeError(f"{name} has no option {option!r}{hint}; valid: {', '.join(info.options)}")
    if not isinstance(model, nn.Module):
        if layer_decay is not None or no_decay is not None or overrides is not None:
            raise ValueError("layer_decay, no_decay and overrides need a module; pass the model itself")
        return info.create(model, **options)
    cls, own = built_by(options["base"]) if info.kind == "wrapper" and "base" in options else (info.cls, options)
    if cls is None:
        raise TypeError(
            f"{name} of a module, with base={options['base']!r}, whose options are not known; valid: a class "
            "or a functools.partial of one, or parameters in place of the module"
        )
    known = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()} | own
    groups = param_groups(
        model,
        lr=known.get("lr"),
        weight_decay=known.get("weight_decay", 0.0),
        layer_decay=layer_decay,
        no_decay=no_decay,
        overrides=overrides,
        kinds=cls.kinds(own) if issubclass(cls, RuleOptimizer) else None,
    )
    if "weight_decay" not in known:
        for group in groups:
            del group["weight_decay"]
    return info.create(groups, **options)


def _lookup(what: str, name: str, table: Mapping[str, Any]) -> Any:
    key = str(name).lower()
    if key not in table:
        raise ValueError(f"unknown {what} {name!r}{did_you_mean(key, table)}; valid: {', '.join(sorted(table))}")
    return table[key]


def _arguments(cls: type) -> tuple[str, ...]:
    return tuple(inspect.signature(cls).parameters)[1:]


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0].rstrip(".")
