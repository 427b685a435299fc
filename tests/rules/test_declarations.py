"""Rules and policies: a signature is a declaration, and mistakes in either are refused by name."""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim.engines import ENGINES
from lightning_optim.engines.base import Bucket, Layout
from lightning_optim.optimizers import Lion
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.rules import Policy, Rule, Slot, Step, Update
from lightning_optim.rules.ops import norm
from lightning_optim.rules.policy import DECAYS, ROUNDINGS


def test_a_rules_signature_is_its_declaration() -> None:
    def rule(p: Any, g: Any, a: Any, b: Any = None, *, lr: Any, step: Any, extra: bool) -> Any:
        return (g, a, b) if extra else (g, a)

    declared = Rule(rule, slots={"b": Slot(when="extra")})
    assert declared.name == "rule"
    assert declared.all_slots == ("a", "b")
    assert declared.slots_under({"extra": False}) == ("a",)
    assert declared.slots_under({"extra": True}) == ("a", "b")
    assert declared.scalars == ("lr", "step")
    assert declared.flags == ("extra",)
    assert declared.counts_steps
    assert not Lion.rule.counts_steps


def no_gradient(p: Any, *, lr: Any) -> Any: ...
def wrong_order(g: Any, p: Any, *, lr: Any) -> Any: ...
def variadic(p: Any, g: Any, *slots: Any, lr: Any) -> Any: ...
def keywords(p: Any, g: Any, **scalars: Any) -> Any: ...


@pytest.mark.parametrize("function", [no_gradient, wrong_order, variadic, keywords])
def test_a_signature_that_is_no_rules_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=rf"a rule's signature is \(p, g, .* {function.__name__} has \("):
        Rule(function)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"slots": {"b": Slot(when="extra")}}, "rule: slots named b; it has a, x"),
        ({"slots": {"p": Slot(when="extra")}}, "rule: slots named p; it has a, x"),
        ({"slots": {"a": Slot(when="lr")}}, "rule: the flags of slots named lr; it has extra"),
        ({"slots": {"a": Slot(unless="more")}}, "rule: the flags of slots named more; it has extra"),
        ({"slots": {"a": Slot(init="beta")}}, "rule: initial values named beta; it has lr"),
        ({"inputs": {"a": "extra"}}, "rule: inputs named a; it has x"),
        ({"inputs": {"x": "lr"}}, "rule: the flags of inputs named lr; it has extra"),
        ({"every": {"lr": "interval"}}, "rule: flags at every n-th step named lr; it has extra"),
        ({"shared": ("extra",)}, "rule: shared scalars named extra; it has lr"),
    ],
)
def test_declarations_must_name_what_the_signature_has(declared: dict[str, Any], message: str) -> None:
    def rule(p: Any, g: Any, a: Any = None, x: Any = None, *, lr: Any, extra: bool) -> Any: ...

    with pytest.raises(TypeError, match=message):
        Rule(rule, **declared)


def test_what_a_step_observes_must_be_declared() -> None:
    def rule(p: Any, g: Any, *, lr: Any) -> Any:
        return Step(lr, g, {"size": norm(g)})

    with pytest.raises(TypeError, match=r"rule observes \['size'\]; it declares \[\]"):
        Update(Rule(rule), Policy()).program  # noqa: B018 - tracing is what raises


@pytest.mark.parametrize(
    "declared",
    [{"rate": "each"}, {"shape": ("height",)}, {"shape": ("rows",), "rate": "row"}, {"init": "p", "rate": "scalar"}],
)
def test_slots_that_cannot_be_are_refused(declared: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="valid: "):
        Slot(**declared)


def test_the_number_of_returned_values_is_checked() -> None:
    def forgets(p: Any, g: Any, a: Any, *, lr: Any) -> Any:
        return lr * g

    with pytest.raises(TypeError, match=r"forgets must return the update and 1 slots \['a'\]; it returned 1 values"):
        Update(Rule(forgets), Policy()).program  # noqa: B018 - tracing is what raises


@pytest.mark.parametrize("options", [{"decay": "l1"}, {"rounding": "up"}])
def test_unknown_policies_are_refused(options: dict[str, Any]) -> None:
    valid = DECAYS if "decay" in options else ROUNDINGS
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}='{value}'; valid: {', '.join(valid)}"):
        Policy(**options)


def test_kahan_needs_a_slot_only_where_weights_are_rounded() -> None:
    for dtype, slots in (("bfloat16", ("exp_avg", "kahan_compensation")), ("float32", ("exp_avg",))):
        assert Update(Lion.rule, Policy(rounding="kahan", weight_dtype=dtype)).slots == slots


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rules_are_pure(name: str) -> None:
    """A rule does not change what it is given: engines read it again."""
    rule = OPTIMIZERS[name].cls.rule
    flags = dict.fromkeys(rule.flags, True)
    update = Update(rule, Policy(), tuple(sorted(flags.items())))
    if update.program.phases:
        pytest.skip("its totals are of no one tensor")
    names = ("p", "g", *rule.slots_under(flags), *rule.inputs_under(flags))
    values = {name: torch.rand(update.shape_of(name, torch.Size([4, 5]))) for name in names}
    kept = {slot: value.clone() for slot, value in values.items()}
    rule(
        values["p"],
        values["g"],
        {s: values[s] for s in values if s not in ("p", "g")},
        dict.fromkeys(rule.scalars, 0.5),
        flags,
    )
    for slot, value in values.items():
        assert torch.equal(value, kept[slot]), slot


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_scalar_of_a_rule_is_an_option(name: str) -> None:
    cls = OPTIMIZERS[name].cls
    group = OPTIMIZERS[name].create([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]
    assert set(cls.rule.scalars) - {"step"} <= set(cls.scalars(group))
    rules = [cls.rule] if cls.matrix_rule is None else [cls.rule, cls.matrix_rule.state]
    flags = {flag for rule in rules for flag in set(rule.flags) - set(rule.every)}
    assert set(cls.flags(group, group["params"][0], True)) == flags
    assert "params" not in inspect.signature(cls.rule.function).parameters


def swap(p: Any, g: Any, a: Any, b: Any, *, lr: Any) -> Any:
    """A rule that stores what it loaded, elsewhere."""
    return lr * g, b, a


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.unavailable() is None])
def test_all_loads_come_before_all_stores(engine: str) -> None:
    update = Update(Rule(swap), Policy())
    tensors = {name: [torch.full((5,), float(i)), torch.full((2,), float(i))] for i, name in enumerate(update.tensors)}
    bucket = Bucket(
        update=update,
        layout=Layout(torch.float32, tuple((name, torch.float32) for name in update.tensors)),
        device=torch.device("cpu"),
        tensors=tensors,
        steps=None,
        groups=array("i", [0, 0]),
        ids=array("i", [0, 1]),
        sizes=(5, 2),
    )
    bucket.locate()
    ENGINES[engine].run(bucket, [{"lr": 2.0}])
    assert {name: float(column[1][0]) for name, column in tensors.items()} == {"p": -2.0, "g": 1.0, "a": 3.0, "b": 2.0}
