"""Every optimizer of the registry has a reference, cases for all its options, and torch's defaults."""

from __future__ import annotations

import inspect

import pytest
import reference

from lightning_optim.registry import OPTIMIZERS

from .common import OPTIMIZER


@OPTIMIZER
def test_each_optimizer_has_a_reference_and_cases_for_all_its_options(name: str) -> None:
    assert {name} <= set(reference.RULES) & set(reference.DECAY) & set(reference.BASE) & set(reference.VARIANTS), (
        f"{name} is registered: tests/reference.py needs its reference and its cases"
    )
    tested = set().union(*reference.cases(name).values())
    elsewhere = {"engine", "rounding"}  # each has tests of its own in this folder
    assert set(OPTIMIZERS[name].options) - tested - elsewhere == set(), "options that no case sets"
    signature = inspect.signature(OPTIMIZERS[name].cls).parameters
    for option in tested:
        values = [case[option] for case in reference.cases(name).values() if option in case]
        assert any(value != signature[option].default for value in values), f"{option} has its default in all cases"


def test_references_are_of_registered_optimizers() -> None:
    for table in (reference.RULES, reference.DECAY, reference.BASE, reference.VARIANTS):
        assert sorted(table) == sorted(OPTIMIZERS)


@OPTIMIZER
def test_defaults_are_torchs(name: str) -> None:
    equivalent = OPTIMIZERS[name].torch_equivalent
    if equivalent is None:
        pytest.skip("torch does not have it")
    theirs = inspect.signature(equivalent).parameters
    for option, parameter in inspect.signature(OPTIMIZERS[name].cls).parameters.items():
        if option in theirs and option != "params":
            assert parameter.default == theirs[option].default, option
