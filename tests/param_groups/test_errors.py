"""Errors say which option, pattern or model is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim.param_groups import param_groups

from .common import GPT


def frozen_head() -> nn.Module:
    model = GPT()
    model.head.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (GPT(), {"lr": -1.0}, ValueError, "lr=-1.0; valid: a finite number >= 0"),
        (GPT(), {"lr": float("nan")}, ValueError, "lr=nan; valid: a finite number"),
        (GPT(), {"lr": "1e-3"}, TypeError, "lr='1e-3' is a str; valid: a finite number"),
        (GPT(), {"lr": torch.tensor(0.1)}, TypeError, "is a Tensor; valid: a finite number"),
        (GPT(), {"weight_decay": -0.1}, ValueError, "weight_decay=-0.1; valid: a finite number >= 0"),
        (GPT(), {"weight_decay": None}, TypeError, "weight_decay=None is a NoneType; valid: a finite number"),
        (GPT(), {"lr": 1.0, "layer_decay": 1.5}, ValueError, r"layer_decay=1.5; valid: a number in \(0, 1\]"),
        (GPT(), {"lr": 1.0, "layer_decay": 0.0}, ValueError, r"layer_decay=0.0; valid: a number in \(0, 1\]"),
        (GPT(), {"layer_decay": 0.5}, ValueError, r"layer_decay=0.5 needs lr="),
        (nn.Linear(2, 2), {"lr": 1.0, "layer_decay": 0.5}, ValueError, "Linear has neither a ModuleList"),
        (GPT(), {"no_decay": "bias"}, TypeError, r"no_decay='bias' must be a list of patterns: \['bias'\]"),
        (GPT(), {"no_decay": [3]}, TypeError, "the pattern 3 must be a string"),
        (GPT(), {"no_decay": ["haed.*"]}, ValueError, r"'haed.\*' matches no parameter; the names are: pos"),
        (GPT(), {"overrides": {"haed.*": {}}}, ValueError, r"'haed.\*' matches no parameter"),
        (frozen_head(), {"overrides": {"head.*": {}}}, ValueError, "matches frozen parameters only"),
        (GPT(), {"overrides": {"head.*": 1e-3}}, TypeError, "=0.001 must be a mapping"),
        (GPT(), {"overrides": {"head.*": {"params": []}}}, ValueError, "sets 'params'"),
        (GPT(), {"overrides": {"head.*": {"name": "x"}}}, ValueError, "sets 'name'"),
        (GPT(), {"overrides": {"head.*": {"lr": torch.tensor(1.0)}}}, TypeError, "must be a number, string"),
        (GPT().requires_grad_(False), {}, ValueError, "parameters of GPT are frozen; include_frozen=True"),
        (nn.Identity(), {}, ValueError, r"Identity has no parameters; .* configure_model\(\)"),
    ],
)
def test_errors(model: nn.Module, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        param_groups(model, **options)


def test_a_list_of_parameters_is_not_a_model() -> None:
    parameters: Iterable[Tensor] = GPT().parameters()
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not generator"):
        param_groups(parameters)  # type: ignore[arg-type]
