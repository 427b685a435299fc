"""Steps of optimizers that ask for evaluations, in tests that have gradients and no loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lightning_optim.stepping.asking import AsksForInputs
from lightning_optim.stepping.curvature import normal_direction

#: Folders whose tests evaluate a model, or are about who does.
EVALUATE = ("conformance", "evaluations", "sophia", "strategies")


def make_up_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have steps that nobody answers take normal numbers: the same for the same parameter and step."""
    stock: Callable[..., Any] = AsksForInputs.asked_for

    def asked_for(self: AsksForInputs, evaluate: Any) -> Any:
        if self.asks and self._inputs is None and evaluate is None:
            made_up = {due.param: normal_direction(due.param, due.number, due.updates) for due in self._due()}
            return dict.fromkeys(self.rule.inputs, made_up)
        return stock(self, evaluate)

    monkeypatch.setattr(AsksForInputs, "asked_for", asked_for)
