"""Optimizers that train at other weights than those with which a model is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim.engines.base import math_dtype
from lightning_optim.rules.interpret import interpret
from lightning_optim.rules.program import Program
from lightning_optim.rules.trace import trace
from lightning_optim.stepping.method import Group, Inputs
from lightning_optim.stepping.shards import local

#: The key of a param group that says whether its weights are those of training.
TRAINS = "train_mode"


class EvaluatesElsewhere:
    """The methods of such optimizers: :meth:`eval` sets the weights of evaluation, :meth:`train` those of training.

    Put it before :class:`~lightning_optim.optimizers.base.RuleOptimizer` among the bases of a class whose rule has
    ``evaluate`` and ``train``, and whose defaults have ``train_mode``.
    """

    param_groups: list[Group]
    state: Any
    rule: ClassVar[Any]
    scalars: Callable[[Group], dict[str, float | Tensor]]

    _aside: Mapping[Tensor, tuple[Tensor, int]] = MappingProxyType({})

    def eval(self) -> None:
        """Set the weights with which the model is evaluated, exported or published; a second call does nothing.

        The weights of training are kept aside meanwhile, in memory of the same size.
        """
        self._aside = kept = dict(self._aside)
        with torch.inference_mode(False), torch.no_grad():  # validation often calls this in inference mode
            for group in self.param_groups:
                if group[TRAINS]:
                    for p, new in self._moved(group, self.rule.evaluate):
                        mine = local(p).detach()
                        old = mine.clone()
                        mine.copy_(new)
                        kept[p] = old, mine._version
                    group[TRAINS] = False

    def train(self) -> None:
        """Set the weights of training again, bit for bit; a second call does nothing.

        Weights that were changed meanwhile (loaded from a checkpoint that was saved after :meth:`eval`, say) are
        computed by the algorithm's formula, and so exact up to rounding.
        """
        with torch.inference_mode(False), torch.no_grad():
            for group in self.param_groups:
                if not group[TRAINS]:
                    for p, new in self._moved(group, self.rule.train):
                        mine = local(p).detach()
                        old, version = self._aside.get(p, (None, 0))
                        mine.copy_(old if old is not None and mine._version == version else new)
                    group[TRAINS] = True
        self._aside = MappingProxyType({})

    def asked_for(self, evaluate: Callable[[], Tensor] | None) -> Inputs | None:
        """See :meth:`~lightning_optim.optimizers.base.RuleOptimizer.asked_for`; before a step, weights must be back.

        Raises:
            RuntimeError: They are the weights of evaluation.
        """
        if not all(group[TRAINS] for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}: step() with the weights of evaluation; valid: train() before the next step"
            )
        return super().asked_for(evaluate)  # type: ignore[misc] # of RuleOptimizer

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`~lightning_optim.optimizers.base.RuleOptimizer.load_state_dict`."""
        super().load_state_dict(state_dict)  # type: ignore[misc] # of RuleOptimizer
        self._aside = MappingProxyType({})

    def _moved(self, group: Group, function: Callable[..., Any]) -> Iterable[tuple[Tensor, Tensor]]:
        """The parameters of a group that have been stepped, each with its new weight."""
        program = _traced(function, self.rule.all_slots)
        scalars = self.scalars(group)
        for p in group["params"]:
            if state := self.state.get(p):
                mine = local(p).detach()
                math = math_dtype(p.dtype)
                math = math.to_complex() if p.is_complex() else math
                loaded = {name: mine if name == "p" else local(state[name]) for name in program.loads}
                tensors = {name: value.to(mine.device, math) for name, value in loaded.items()}
                yield p, interpret(program, tensors, scalars, math)["p"]


@cache  # one or two for each class
def _traced(function: Callable[..., Any], slots: tuple[str, ...]) -> Program:
    code = function.__code__
    tensors = code.co_varnames[: code.co_argcount]
    scalars = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    if unknown := set(tensors) - {"p", *slots}:
        raise TypeError(f"{function.__name__} has {', '.join(sorted(unknown))}; valid: p, {', '.join(slots)}")
    return trace(lambda **values: {"p": function(**values)}, tensors=tensors, scalars=scalars, name=function.__name__)
