"""Every optimizer of the registry has a reference, cases for all its options, and torch's defaults."""

from __future__ import annotations

import inspect

import pytest
import references

from lightning_optim.registry import OPTIMIZERS

from .common import OPTIMIZER


def test_each_optimizer_has_a_reference() -> None:
    missing = [f"tests/references/{name}.py" for name in OPTIMIZERS if name not in references.REFERENCES]
    assert missing == [], "see the top of tests/references/__init__.py for what is in them"
    assert sorted(references.REFERENCES) == sorted(OPTIMIZERS), "a reference of no optimizer"


@OPTIMIZER
def test_each_optimizer_has_cases_for_all_its_options(name: str) -> None:
    tested = set().union(*references.cases(name).values())
    # Each has tests of its own in this folder, but for what brings a rule's inputs: tests/sophia.
    elsewhere = {"engine", "rounding", "hessian"}
    assert set(OPTIMIZERS[name].options) - tested - elsewhere == set(), "options that no case sets"
    signature = inspect.signature(OPTIMIZERS[name].cls).parameters
    for option in tested:
        values = [case[option] for case in references.cases(name).values() if option in case]
        assert any(value != signature[option].default for value in values), f"{option} has its default in all cases"


@OPTIMIZER
def test_defaults_are_torchs(name: str) -> None:
    equivalent = OPTIMIZERS[name].torch_equivalent
    if equivalent is None:
        pytest.skip("torch does not have it")
    theirs = inspect.signature(equivalent).parameters
    for option, parameter in inspect.signature(OPTIMIZERS[name].cls).parameters.items():
        if option in theirs and option != "params":
            assert parameter.default == theirs[option].default, option
