"""Which rules step all parameters of an optimizer together, so that some of them cannot be stepped by themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from lightning_optim.rules.matrix import MatrixRule
from lightning_optim.rules.policy import Policy, Update
from lightning_optim.rules.program import Program
from lightning_optim.rules.rule import Rule
from lightning_optim.stepping.method import Group, Method


class Ruled(Method, Protocol):
    """The interface of an optimizer class that tells all its rules."""

    matrix_rule: MatrixRule | None

    def rules(self) -> tuple[Rule, ...]:
        """All rules by which a parameter may be stepped."""


def plain_update(method: Method, group: Group, p: Tensor, *, fresh: bool, due: bool) -> Update:
    """The update of a parameter without a policy.

    Args:
        method: The optimizer's class.
        group: The param group.
        p: The parameter.
        fresh: Whether it has had no step yet.
        due: Whether the flags that are set at every n-th step are set.
    """
    flags = dict.fromkeys(method.rule.every, due) | method.flags(group, p, fresh)
    return Update(method.rule, Policy(), tuple(sorted(flags.items())))


def programs(method: Method, groups: Iterable[Group]) -> list[Program]:
    """The Programs by which the parameters of these groups are stepped, without a policy."""
    updates = {
        plain_update(method, group, p, fresh=fresh, due=True)
        for group in groups
        for p in group["params"]
        for fresh in (True, False)
    }
    return [update.program for update in updates]


def why_one_whole(method: Ruled, groups: Sequence[Group]) -> str | None:
    """Why stepping the parameters in parts would give another result, or None if it would not.

    Args:
        method: The optimizer's class.
        groups: Its param groups.
    """
    if any(rule.shares for rule in method.rules()):
        return "its step keeps numbers that all of its parameters have in common"
    if method.matrix_rule is None and any(program.phases for program in programs(method, groups)):
        return "its step sums over all of its parameters"
    return None


def why_together(method: Ruled, groups: Sequence[Group]) -> str | None:
    """Why all parameters that have a gradient must be stepped together; None: each can be stepped by itself.

    Args:
        method: The optimizer's class.
        groups: Its param groups.
    """
    if (reason := why_one_whole(method, groups)) is not None:
        return reason
    counted = method.matrix_rule is not None and method.matrix_rule.interval is not None
    if counted or any(rule.every for rule in method.rules()):
        return "it does more at every n-th step, which it counts for all parameters of a group"
    if any(rule.inputs for rule in method.rules()):
        return "its step needs more than gradients"
    return None
