"""An update rule: a pure function, and what can be read off its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)  # a rule is itself: functions cannot be compared otherwise
class Rule:
    """An optimizer's mathematics, once, for every engine.

    The function's signature is its declaration. Positional parameters are tensors: the weight ``p``, the gradient
    ``g``, then the state *slots* by their names in ``state_dict``. Keyword-only parameters are scalars, by the
    names of the param-group options (``betas`` gives ``beta1``, ``beta2``, ...; ``step`` counts from 1); those
    annotated ``bool`` are *flags*: known when the rule is traced, so that plain ``if`` works on them. The function
    returns the update, which is subtracted from the weight, and the new value of every slot.

    Decay, clipping, rounding and the write are not the rule's business: see
    :class:`~lightning_optim.rules.policy.Policy`.

    Args:
        function: The mathematics, in the operations of :mod:`lightning_optim.rules.ops`.
        optional: Slots (default ``None`` in the signature) that exist only when a flag of this name is set.

    Raises:
        TypeError: The signature does not begin with ``(p, g)``, or ``optional`` names something it does not have.

    >>> from lightning_optim.rules.ops import lerp, sign
    >>> def signum(p, g, momentum_buffer, *, lr, momentum):
    ...     momentum_buffer = lerp(momentum_buffer, g, 1 - momentum)
    ...     return lr * sign(momentum_buffer), momentum_buffer
    >>> rule = Rule(signum)
    >>> rule.slots({}), rule.scalars
    (('momentum_buffer',), ('lr', 'momentum'))
    """

    function: Callable[..., Any]
    optional: Mapping[str, str] = field(default_factory=dict)
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
                f"a rule's signature is (p, g, *slots by name, *, scalars by name); "
                f"{self.name} has {inspect.signature(self.function)}"
            )
        flags = tuple(p.name for p in keyword if p.annotation in (bool, "bool"))
        for slot, flag in self.optional.items():
            if slot not in positional[2:] or flag not in flags:
                raise TypeError(
                    f"optional slot {slot!r} with flag {flag!r}: the slots of {self.name} are {positional[2:]}, "
                    f"its flags {list(flags)}"
                )
        object.__setattr__(self, "all_slots", tuple(positional[2:]))
        object.__setattr__(self, "flags", flags)
        object.__setattr__(self, "scalars", tuple(p.name for p in keyword if p.name not in flags))

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @property
    def counts_steps(self) -> bool:
        """Whether the rule reads ``step``, so that the state must keep it."""
        return "step" in self.scalars

    def slots(self, flags: Mapping[str, bool]) -> tuple[str, ...]:
        """The slots that exist under ``flags``."""
        return tuple(s for s in self.all_slots if s not in self.optional or flags[self.optional[s]])

    def __call__(
        self, p: Any, g: Any, slots: Mapping[str, Any], scalars: Mapping[str, Any], flags: Mapping[str, bool]
    ) -> tuple[Any, dict[str, Any]]:
        """The update and the new value of each slot.

        Raises:
            TypeError: The function returned another number of values than an update and its slots.
        """
        result = self.function(p, g, **slots, **{name: scalars[name] for name in self.scalars}, **flags)
        values = result if isinstance(result, tuple) else (result,)
        if len(values) != 1 + len(slots):
            raise TypeError(
                f"{self.name} must return the update and {len(slots)} slots {list(slots)}; it returned "
                f"{len(values)} values"
            )
        return values[0], dict(zip(slots, values[1:], strict=True))
