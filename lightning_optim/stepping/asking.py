"""Optimizers whose rule takes more than gradients, which whoever trains with them evaluates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim.rules.rule import UPDATES, Rule
from lightning_optim.stepping.evaluations import Evaluator, LossEvaluator, Request
from lightning_optim.stepping.method import Group, Inputs


@dataclass(frozen=True)
class Due:
    """A parameter whose step needs inputs.

    Attributes:
        param: The parameter.
        number: Its number in the optimizer.
        updates: The number of the steps before.
        group: Its param group.
    """

    param: Tensor
    number: int
    updates: int
    group: Group


class AsksForInputs:
    """To come before :class:`~lightning_optim.optimizers.base.RuleOptimizer`, where the rule has ``inputs``.

    A subclass says by :attr:`request` what it asks for, and by :meth:`evaluated` what its rule is given.
    """

    request: ClassVar[Request]
    rule: ClassVar[Rule]
    param_groups: list[Group]
    _inputs: Inputs | None = None  # for the step to come; not part of any state

    def evaluated(self, due: list[Due], evaluator: Evaluator) -> Inputs:
        """What the rule is given at this step.

        Args:
            due: The parameters that need it.
            evaluator: Evaluates.
        """
        raise NotImplementedError

    @property
    def asks(self) -> bool:
        """Whether the next step needs an evaluation: by :meth:`ask`, or ``step(evaluate=...)``."""
        return any(map(self._is_due, self.param_groups))

    def ask(self, evaluator: Evaluator) -> None:
        """Have evaluated what the next step needs; see :mod:`lightning_optim.stepping.evaluations`."""
        self._inputs = self.evaluated(list(self._due()), evaluator)

    def abandon(self) -> None:
        """Forget what was evaluated for a step that does not come."""
        self._inputs = None

    def asked_for(self, evaluate: Callable[[], Tensor] | None) -> Inputs | None:
        """What the step that is going on is given.

        Args:
            evaluate: As of ``step``.

        Raises:
            RuntimeError: Nobody has evaluated what it needs.
        """
        inputs, self._inputs = self._inputs, None
        if inputs is not None or not self.asks:
            return inputs
        if evaluate is not None:
            return self.evaluated(list(self._due()), LossEvaluator(self, evaluate))  # type: ignore[arg-type] # it is one
        # torch.distributed.checkpoint has optimizers make such a step to allocate their state.
        if all("lr" in group and float(group["lr"]) == 0 for group in self.param_groups):
            return {name: {due.param: _unknown(due.param) for due in self._due()} for name in self.rule.inputs}
        name: Any = type(self).__name__
        raise RuntimeError(
            f"{name}: step() without evaluate=, where the step needs second derivatives of the loss; valid: "
            "step(evaluate=lambda: loss_of(batch)), a function that runs the model forward and returns the loss (it is "
            "called only where optimizer.asks); under a Lightning Trainer: strategy='in_graph' or 'in_graph_ddp'"
        )

    def _is_due(self, group: Group) -> bool:
        return any(self.rule.due(group, flag) for flag in self.rule.inputs.values())

    def _due(self) -> Iterator[Due]:
        numbers = count()
        for group in self.param_groups:
            due = self._is_due(group)
            for p, number in zip(group["params"], numbers, strict=False):
                if due:
                    yield Due(p, number, group[UPDATES], group)


@torch.no_grad()
def _unknown(p: Tensor) -> Tensor:
    """An estimate that leaves everything as it is."""
    return torch.full_like(p, torch.nan, requires_grad=False)
