"""Rules of matrices: element-wise rules, and what is done to whole matrices between them.

The language has no products of matrices. A matrix rule is a chain: a rule that turns the gradient into a direction; a
*transform* of whole matrices, in plain torch; perhaps a rule that works on what the transform has made, and the way
back; and a rule that moves the weight. The rules are Programs like any other, for any engine. The transform is given
all matrices of one shape at once, stacked.

======== =================== ================ =================== ====================
rule     direction           transform        within              back
======== =================== ================ =================== ====================
Muon     momentum            orthogonalize
SOAP     the gradient        into eigenbases  Adam                out of the eigenbases
NorMuon  momentum            orthogonalize    divide by row norms
Shampoo  the gradient        precondition     grafting
======== =================== ================ =================== ====================
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter, Signature
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim.rules.rule import UPDATES, Rule
from lightning_optim.rules.slots import Slot

Group = dict[str, Any]


def follow(p: Any, g: Any) -> Any:
    """The rule by which a weight moves along what it is given, as far as that goes."""
    return g


def identity(p: Any, g: Any) -> Any:
    """The rule of a direction that is the gradient itself: unscaled, clipped, and with L2 decay."""
    return g


FOLLOW, GRADIENT = Rule(follow), Rule(identity)


@dataclass
class Stack:
    """Matrices of one shape, and what is known of them: what a transform works on.

    Attributes:
        constants: What the transform said that they have in common.
        due: Whether this is a step at which the state is renewed.
        read: The value of one slot, of all of them; in the type of the matrices.
        new: Where the transform puts new values of slots. They are written when all are computed.
    """

    constants: Any
    due: bool
    read: Callable[[str], Tensor]
    new: dict[str, Tensor] = field(default_factory=dict)


class Transform:
    """What is done to whole matrices, in plain torch; a subclass has the mathematics.

    No method may change what it is given, or wait for the device.

    Attributes:
        any_order: Whether it comes to the same for a matrix's transpose, and for columns in another order, and reads no
            slots. Then weights that lie in memory so are not copied.
        most: Of how many numbers a stack of several matrices may be; None: of any. What is stacked is copied, so this
            bounds the memory that a step takes for a while.
        workspace: About how many bytes a step takes for a while for each number of a matrix, on a device.
    """

    any_order: ClassVar[bool] = False
    most: ClassVar[int | None] = None
    workspace: ClassVar[int] = 4

    def shape(self, group: Group, p: Tensor) -> tuple[int, ...] | None:
        """As how many matrices a weight is stepped, and of which shape; None for one that stays as it is.

        Args:
            group: The weight's param group.
            p: The weight.
        """
        raise NotImplementedError

    def constants(self, group: Group, shape: tuple[int, ...]) -> Hashable:
        """What of a group's options it depends on; matrices of one stack are those for which this is the same.

        Args:
            group: The param group.
            shape: From :meth:`shape`.
        """
        raise NotImplementedError

    def dtype(self, p: Tensor) -> torch.dtype:
        """What it computes in."""
        return torch.float64 if p.dtype == torch.float64 else torch.float32

    def forth(self, x: Tensor, stack: Stack) -> Tensor:
        """What the rule within, or the move, is given.

        Args:
            x: The directions, ``(matrices, *shape)``.
            stack: What else is known of them.
        """
        raise NotImplementedError

    def back(self, x: Tensor, given: Tensor, stack: Stack) -> Tensor:
        """What the move is given.

        Args:
            x: From the rule within.
            given: The directions that :meth:`forth` was given.
            stack: What else is known of them; slots of the rule within are as it has left them.
        """
        raise NotImplementedError

    def begin(self, x: Tensor, stack: Stack) -> None:
        """Make the first state from the first directions, where these are no step; see ``begins`` of a MatrixRule."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class MatrixRule:
    """An update rule for weights that are stepped as whole matrices.

    Args:
        direction: From the gradient to what is transformed.
        transform: What is done to whole matrices.
        within: A rule for what the transform has made, which is then transformed back; None: the move comes next.
        move: How a weight follows what comes out. Weight decay and rounding are here.
        slots: What is kept beside the slots of the rules, for the transform.
        begins: Whether a weight's first gradient only makes its state.
        interval: The option that says after how many steps the state is renewed; None: none is.
    """

    direction: Rule
    transform: Transform
    within: Rule | None = None
    move: Rule = FOLLOW
    slots: Mapping[str, Slot] = field(default_factory=dict)
    begins: bool = False
    interval: str | None = None

    @cached_property
    def state(self) -> Rule:
        """All that is kept for a weight, as the slots of one rule, which no engine runs."""
        rules = [rule for rule in (self.direction, self.within, self.move) if rule is not None]
        if not self.slots and not any(rule.slots for rule in rules[1:]):
            return self.direction
        slots = {name: slot for rule in rules for name, slot in rule.slots.items()} | dict(self.slots)
        conditions = (flag for slot in self.slots.values() for flag in (slot.when, slot.unless) if flag is not None)
        flags = dict.fromkeys([flag for rule in rules for flag in rule.flags] + [*conditions])
        scalars = dict.fromkeys(name for rule in rules for name in rule.scalars)

        def kept(p: Any, g: Any, **named: Any) -> Any:
            return (g, *(named[name] for name in slots if named.get(name) is not None))

        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("p", "g", *slots)]
        parameters += [Parameter(name, Parameter.KEYWORD_ONLY) for name in scalars]
        parameters += [Parameter(name, Parameter.KEYWORD_ONLY, annotation=bool) for name in flags]
        kept.__signature__ = Signature(parameters)  # type: ignore[attr-defined] # read by `inspect.signature`
        return Rule(kept, slots=slots)

    def due(self, group: Mapping[str, Any]) -> bool:
        """Whether the next step of a group renews the state: the first step of all never does."""
        done = int(group.get(UPDATES, 0))
        return self.interval is not None and done > 0 and done % int(group[self.interval]) == 0
