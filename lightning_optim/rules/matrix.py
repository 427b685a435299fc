"""Matrix rules: element-wise rules with a transform of whole matrices between them.

The language has no products of matrices. A matrix rule is a chain: a rule that turns the gradient into a direction; a
*transform* of whole matrices, in plain torch; optionally a rule that works on the transformed direction, and the
transform back; and a rule that moves the weight. The rules are Programs like any other, for any engine. The transform
is given all matrices of one shape at once, stacked.

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
    """The rule of a move whose update is the direction itself, without a factor."""
    return g


def identity(p: Any, g: Any) -> Any:
    """The rule of a direction that is the gradient itself, after unscaling, clipping and L2 decay."""
    return g


FOLLOW, GRADIENT = Rule(follow), Rule(identity)


@dataclass
class Stack:
    """What a transform knows about a stack of matrices of one shape.

    Attributes:
        constants: What :meth:`Transform.constants` returned for all of them.
        due: Whether this is a step at which the state is renewed.
        read: Returns the values of a slot for all matrices, in the type of the matrices.
        new: New values of slots by name, put here by the transform. They are written when all are computed.
    """

    constants: Any
    due: bool
    read: Callable[[str], Tensor]
    new: dict[str, Tensor] = field(default_factory=dict)


class Transform:
    """A transform of whole matrices, in plain torch; a subclass has the mathematics.

    No method may change what it is given, or wait for the device.

    Attributes:
        any_order: Whether the transform commutes with transposing a matrix and with reordering its columns, and reads
            no slots. Then weights that lie transposed or reordered in memory are not copied.
        most: The most elements that a stack of several matrices may have; None: any number. Stacking copies, so this
            bounds the temporary memory of a step.
        workspace: About how many bytes of temporary device memory a step needs for each element of a matrix.
    """

    any_order: ClassVar[bool] = False
    most: ClassVar[int | None] = None
    workspace: ClassVar[int] = 4

    def shape(self, group: Group, p: Tensor) -> tuple[int, ...] | None:
        """How many matrices a weight is stepped as, and their shape: ``(matrices, *shape)``; None: its update is zero.

        Args:
            group: The weight's param group.
            p: The weight.
        """
        raise NotImplementedError

    def constants(self, group: Group, shape: tuple[int, ...]) -> Hashable:
        """The values that the transform depends on, from a group's options; they are equal for all matrices of a stack.

        Args:
            group: The param group.
            shape: The shape of a matrix, from :meth:`shape`.
        """
        raise NotImplementedError

    def dtype(self, p: Tensor) -> torch.dtype:
        """The type that the transform computes in."""
        return torch.float64 if p.dtype == torch.float64 else torch.float32

    def forth(self, x: Tensor, stack: Stack) -> Tensor:
        """Transform directions; the result is the input of the rule within or, without one, of the move.

        Args:
            x: The directions, ``(matrices, *shape)``.
            stack: What else is known about them.
        """
        raise NotImplementedError

    def back(self, x: Tensor, given: Tensor, stack: Stack) -> Tensor:
        """Transform back; the result is the input of the move.

        Args:
            x: The update of the rule within.
            given: The directions that :meth:`forth` was given.
            stack: What else is known about them; the slots of the rule within have their new values.
        """
        raise NotImplementedError

    def begin(self, x: Tensor, stack: Stack) -> None:
        """Make the first state from the first directions, at which no weight is stepped: ``begins`` of a MatrixRule."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class MatrixRule:
    """An update rule for weights that are stepped as whole matrices.

    Args:
        direction: The rule that makes a direction from the gradient.
        transform: The transform of whole matrices.
        within: A rule for the transformed direction, whose update is transformed back; None: the move comes next.
        move: The rule that moves the weight. Weight decay and rounding are applied here.
        slots: The transform's own slots, besides those of the rules.
        begins: Whether a weight's first gradient only makes its state.
        interval: The option that says after how many steps the state is renewed; None: it never is.
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
        """A rule that has all slots that are kept for a weight; no engine runs it."""
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
        """Whether the next step of a group renews the state; the group's very first step never does."""
        done = int(group.get(UPDATES, 0))
        return self.interval is not None and done > 0 and done % int(group[self.interval]) == 0
