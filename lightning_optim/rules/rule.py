"""Update rules: a pure function, what its signature says, and what is declared besides."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lightning_optim.rules.slots import Slot

#: The param group's key for the number of steps so far, if a rule does something at every n-th step.
UPDATES = "updates"


@dataclass(frozen=True)
class Step:
    """An update whose size is not the learning rate alone: ``size * direction``.

    A rule may return it in place of an update. Weight decay then multiplies by the size, as by the learning rate
    otherwise.

    Args:
        size: A scalar.
        direction: What it multiplies.
        observe: Numbers of interest, one for each tensor, by name: see
            :meth:`~lightning_optim.optimizers.base.RuleOptimizer.observed`.
    """

    size: Any
    direction: Any
    observe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)  # a rule is itself: functions cannot be compared otherwise
class Rule:
    """An optimizer's mathematics, once, for every engine.

    The function's signature is its declaration. Positional parameters are tensors: the weight ``p`` (before decay),
    the gradient ``g``, the state *slots* by their names in ``state_dict``, then further *inputs*. Keyword-only
    parameters are scalars, by the names of the param-group options (``betas`` gives ``beta1``, ``beta2``, ...; ``step``
    counts from 1); those annotated ``bool`` are *flags*: known when the rule is traced, so that plain ``if`` works on
    them. The function returns the update, which is subtracted from the weight, or a :class:`Step`, and the new value of
    every slot.

    Decay, clipping, rounding and the write are not the rule's business: see
    :class:`~lightning_optim.rules.policy.Policy`.

    Args:
        function: The mathematics, in the operations of :mod:`lightning_optim.rules.ops`.
        slots: Declarations of slots; a slot without one always exists, and starts as zeros of the weight's shape.
        inputs: Tensors of the weight's shape that come from outside of the rule, each with the flag under which it is
            given.
        every: Flags that are set at every n-th step of the optimizer, each with the option that holds n.
        shared: Scalars whose value is the first param group's for all parameters: those that shared slots depend on.
        evaluate: Computes the weight to evaluate the model with from ``p``, slots and scalars; None: it is ``p``.
        train: The inverse of ``evaluate``: computes the weight to train with from that weight.
        observe: Names of the numbers that its Steps observe.

    Raises:
        TypeError: The signature does not begin with ``(p, g)``, or a declaration has a name that the signature lacks.

    >>> from lightning_optim.rules.ops import lerp, sign
    >>> def signum(p, g, momentum_buffer, *, lr, momentum):
    ...     momentum_buffer = lerp(momentum_buffer, g, 1 - momentum)
    ...     return lr * sign(momentum_buffer), momentum_buffer
    >>> rule = Rule(signum)
    >>> rule.slots_under({}), rule.scalars
    (('momentum_buffer',), ('lr', 'momentum'))
    """

    function: Callable[..., Any]
    slots: Mapping[str, Slot] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    every: Mapping[str, str] = field(default_factory=dict)
    shared: Collection[str] = ()
    evaluate: Callable[..., Any] | None = None
    train: Callable[..., Any] | None = None
    observe: tuple[str, ...] = ()
    positional: tuple[str, ...] = field(init=False)
    all_slots: tuple[str, ...] = field(init=False)
    scalars: tuple[str, ...] = field(init=False)
    flags: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Read the signature."""
        parameters = inspect.signature(self.function).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        keyword = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        if positional[:2] != ["p", "g"] or len(positional) + len(keyword) != len(parameters):
            raise TypeError(
                f"a rule's signature is (p, g, *slots by name, *inputs by name, *, scalars by name); "
                f"{self.name} has {inspect.signature(self.function)}"
            )
        flags = tuple(p.name for p in keyword if p.annotation in (bool, "bool"))
        scalars = tuple(p.name for p in keyword if p.name not in flags)
        slots = tuple(name for name in positional[2:] if name not in self.inputs)
        conditions = [flag for slot in self.slots.values() for flag in (slot.when, slot.unless) if flag is not None]
        options = [slot.init for slot in self.slots.values() if isinstance(slot.init, str) and slot.init != "p"]
        for what, names, valid in (
            ("slots", self.slots, slots),
            ("inputs", self.inputs, positional[2 + len(slots) :]),
            ("the flags of slots", conditions, flags),
            ("the flags of inputs", self.inputs.values(), flags),
            ("flags at every n-th step", self.every, flags),
            ("shared scalars", self.shared, scalars),
            ("initial values", options, scalars),
        ):
            if unknown := sorted(set(names) - set(valid)):
                raise TypeError(f"{self.name}: {what} named {', '.join(unknown)}; it has {', '.join(valid) or 'none'}")
        object.__setattr__(self, "positional", tuple(positional[2:]))
        object.__setattr__(self, "all_slots", slots)
        object.__setattr__(self, "slots", {name: self.slots.get(name, Slot()) for name in slots})
        object.__setattr__(self, "flags", flags)
        object.__setattr__(self, "scalars", scalars)

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @property
    def counts_steps(self) -> bool:
        """Whether the rule reads ``step``, so that the state must keep it."""
        return "step" in self.scalars

    @cached_property
    def shares(self) -> bool:
        """Whether all parameters have slots in common."""
        return any(slot.rate == "shared" for slot in self.slots.values())

    def due(self, group: Mapping[str, Any], flag: str) -> bool:
        """Whether a flag that is set at every n-th step is set at a param group's next step."""
        return bool(group.get(UPDATES, 0) % max(int(group[self.every[flag]]), 1) == 0)

    def slots_under(self, flags: Mapping[str, bool]) -> tuple[str, ...]:
        """The slots that exist under ``flags``."""
        return tuple(name for name, slot in self.slots.items() if slot.exists(flags))

    def inputs_under(self, flags: Mapping[str, bool]) -> tuple[str, ...]:
        """The inputs that come under ``flags``."""
        return tuple(name for name, flag in self.inputs.items() if flags[flag])

    def __call__(
        self, p: Any, g: Any, tensors: Mapping[str, Any], scalars: Mapping[str, Any], flags: Mapping[str, bool]
    ) -> tuple[Any, dict[str, Any]]:
        """The update or Step, and the new value of each slot.

        Args:
            p: The weight.
            g: The gradient.
            tensors: The slots and inputs that exist, by name; for the others the function gets None.
            scalars: The scalars by name.
            flags: The flags by name.

        Raises:
            TypeError: The function returned another number of values than an update and its slots, or its Step
                observes other names than were declared.
        """
        given = dict.fromkeys(self.positional) | dict(tensors)
        result = self.function(p, g, **given, **{name: scalars[name] for name in self.scalars}, **flags)
        values = result if isinstance(result, tuple) else (result,)
        slots = [name for name in tensors if name not in self.inputs]
        if len(values) != 1 + len(slots):
            raise TypeError(
                f"{self.name} must return the update and {len(slots)} slots {slots}; it returned {len(values)} values"
            )
        observed = set(values[0].observe) if isinstance(values[0], Step) else set[str]()
        if observed != set(self.observe):
            raise TypeError(f"{self.name} observes {sorted(observed)}; it declares {sorted(self.observe)}")
        return values[0], dict(zip(slots, values[1:], strict=True))
