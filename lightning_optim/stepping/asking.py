"""Optimizers whose rule needs more than gradients, which a strategy or the training loop evaluates."""

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
        updates: How many steps its param group has made.
        group: Its param group.
    """

    param: Tensor
    number: int
    updates: int
    group: Group


class AsksForInputs:
    """Base class for optimizers whose rule has ``inputs``, to be named before ``RuleOptimizer`` among the bases.

    A subclass says what it asks for by :attr:`request`, and computes its rule's inputs in :meth:`evaluated`.
    """

    request: ClassVar[Request]
    rule: ClassVar[Rule]
    param_groups: list[Group]
    _inputs: Inputs | None = None  # for the step to come; not part of any state

    def evaluated(self, due: list[Due], evaluator: Evaluator) -> Inputs:
        """The rule's inputs at this step.

        Args:
            due: The parameters that need inputs.
            evaluator: Evaluates the loss again.
        """
        raise NotImplementedError

    @property
    def asks(self) -> bool:
        """Whether the next step needs an evaluation: by :meth:`ask`, or ``step(evaluate=...)``."""
        return any(map(self._is_due, self.param_groups))

    def ask(self, evaluator: Evaluator) -> None:
        """Evaluate the inputs of the next step; see :mod:`lightning_optim.stepping.evaluations`."""
        self._inputs = self.evaluated(list(self._due()), evaluator)

    def abandon(self) -> None:
        """Forget the inputs of a step that does not take place."""
        self._inputs = None

    def asked_for(self, evaluate: Callable[[], Tensor] | None) -> Inputs | None:
        """The inputs of the current step; None if it needs none.

        Args:
            evaluate: As in ``step``.

        Raises:
            RuntimeError: The step needs inputs, and nobody has evaluated them.
        """
        inputs, self._inputs = self._inputs, None
        if inputs is not None or not self.asks:
            return inputs
        if evaluate is not None:
            return self.evaluated(list(self._due()), LossEvaluator(self, evaluate))  # type: ignore[arg-type] # it is one
        # torch.distributed.checkpoint makes a step with lr=0 so that optimizers allocate their state.
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
    """An estimate of NaN, which leaves the average of estimates as it is."""
    return torch.full_like(p, torch.nan, requires_grad=False)
