"""The rules of an optimizer that steps matrices and other parameters differently, each as a Method of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lightning_optim.rules.matrix import MatrixRule
from lightning_optim.rules.policy import Decay
from lightning_optim.rules.rule import Rule
from lightning_optim.stepping.method import Group, Method
from lightning_optim.stepping.scalars import scalars_of


@dataclass(frozen=True)
class Rest:
    """The element-wise rule of parameters that are no matrices.

    Attributes:
        rule: The rule.
        name: The rule's name, for reports.
        flags: Values of the rule's flags that are not options of the optimizer.
    """

    rule: Rule
    name: str
    flags: Mapping[str, bool] = field(default_factory=dict)


class RoutedMethod(Method, Protocol):
    """The interface of an optimizer class with a matrix rule."""

    matrix_rule: MatrixRule
    rest: Rest

    def by_matrices(self, group: Group, p: Tensor) -> bool:
        """Whether the matrix rule steps a parameter; else the rest's rule does."""


class Link:
    """One of several rules by which an optimizer steps, as a Method.

    Args:
        method: The optimizer.
        rule: The rule.
        name: The rule's name, for reports; None: the optimizer's own name.
        flags: Values of the rule's flags that are not options of the optimizer.
    """

    def __init__(
        self, method: Method, rule: Rule, name: str | None = None, flags: Mapping[str, bool] | None = None
    ) -> None:
        self.method, self.rule = method, rule
        self._name, self._flags = name, dict(flags or {})

    def public_name(self) -> str:
        """See :class:`Method`."""
        name = self.method.public_name()
        return name if self._name is None else f"{name}'s {self._name}"

    def flags(self, group: Group, p: Tensor, fresh: bool) -> dict[str, bool]:
        """See :class:`Method`."""
        if not self.rule.flags:
            return {}
        known = {**self.method.flags(group, p, fresh), **self._flags}
        return {name: known[name] if name in known else bool(group[name]) for name in self.rule.flags}

    def decay(self, group: Group) -> Decay:
        """See :class:`Method`."""
        return self.method.decay(group)

    def scalars(self, group: Group) -> dict[str, float | Tensor]:
        """See :class:`Method`."""
        return {**scalars_of(self.rule, group), **self.method.scalars(group)}
