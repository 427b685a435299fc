"""What tracing makes of a rule: well-formed programs that say what the rule does."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_optim.optimizers import LAMB, Lion
from lightning_optim.optimizers.adam import ADAM
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.rules import Policy, Program, Update, ops, trace
from lightning_optim.rules.program import Node, Rate

from .common import interpret, vector

LION = """\
lion(p, g, exp_avg; lr, beta1, beta2, weight_decay)
  %0 = load name='p'  # element, stage 0
  %1 = load name='g'  # element, stage 0
  %2 = load name='exp_avg'  # element, stage 0
  %3 = scalar name='lr'  # scalar, stage 0
  %4 = scalar name='beta1'  # scalar, stage 0
  %5 = scalar name='beta2'  # scalar, stage 0
  %6 = scalar name='weight_decay'  # scalar, stage 0
  %7 = mul %3 %6  # scalar, stage 0
  %8 = constant value=1.0 repr='1.0'  # constant, stage 0
  %9 = sub %8 %7  # scalar, stage 0
  %10 = mul %0 %9  # element, stage 0
  %11 = sub %8 %4  # scalar, stage 0
  %12 = lerp %2 %1 %11  # element, stage 0
  %13 = sign %12  # element, stage 0
  %14 = mul %3 %13  # element, stage 0
  %15 = sub %8 %5  # scalar, stage 0
  %16 = lerp %2 %1 %15  # element, stage 0
  %17 = sub %10 %14  # element, stage 0
  store p %17
  store exp_avg %16"""


def test_the_program_of_lion() -> None:
    assert str(Update(Lion.rule, Policy(decay="decoupled")).program) == LION


def updates() -> list[Update]:
    """Every optimizer's rule under all its flags and many policies."""
    found = {}
    for info in OPTIMIZERS.values():
        rule = info.cls.rule
        choices = list(itertools.product((False, True), repeat=len(rule.flags)))
        for values in choices if len(rule.flags) < 4 else [c for c in choices if sum(c) in (1, len(rule.flags))]:
            flags = tuple(sorted(zip(rule.flags, values, strict=True)))
            for policy in (
                Policy(),
                Policy(decay="decoupled", cautious=True, scaled=True, copy=True),
                Policy(decay="l2", maximize=True, rounding="kahan", weight_dtype="bfloat16"),
                Policy(decay="proximal", rounding="stochastic", weight_dtype="bfloat16"),
            ):
                update = Update(rule, policy, flags)
                found[update] = update
    return list(found)


@pytest.mark.parametrize("update", updates(), ids=lambda u: f"{u.rule.name}-{len(u.flags)}-{u.policy.decay}")
def test_programs_are_well_formed(update: Update) -> None:
    program = update.program
    for index, node in enumerate(program.nodes):
        assert all(arg < index for arg in node.args), "an operand comes after its use"
        if node.rate > Rate.SCALAR and node.op in ops.OPS:
            operands = [program.nodes[arg] for arg in node.args]
            assert any(operand.rate > Rate.SCALAR for operand in operands), f"%{index} belongs out of the loop"
    assert len({(n.op, n.args, n.attrs) for n in program.nodes}) == len(program.nodes), "a subexpression twice"
    used = {arg for node in program.nodes for arg in node.args} | {i for _, i in program.stores} | {*program.results}
    assert used == set(range(len(program.nodes))), "dead code"
    stored, written = {name for name, _ in program.stores}, set(update.tensors) - {"g", *update.inputs}
    # What a rule does at every n-th step only leaves a slot alone at the others; one may keep the first weight.
    kept = {name for name in update.slots if update.slot(name).init == "p"}
    assert stored >= written - kept if not update.rule.every else stored <= written
    if program.has_sides:
        return  # no kernel is printed of it
    done: set[int] = set()
    for sweep in program.passes:
        done |= set(sweep.scalars)
        assert set(sweep.inputs) <= done, "a loop reads a scalar that is not there yet"
        done |= set(sweep.reductions)
        assert all(program.nodes[i].rate == Rate.ELEMENT for i in sweep.elements)
    assert all(not sweep.reductions for sweep in program.passes[-1:])
    assert all(sweep.reductions for sweep in program.passes[:-1])


@pytest.mark.parametrize(
    "update",
    [update for update in updates() if not update.program.phases],  # no total is over one tensor: see tests/language
    ids=lambda u: f"{u.rule.name}-{len(u.flags)}-{u.policy.decay}",
)
def test_a_program_says_what_its_rule_does(update: Update) -> None:
    random = torch.Generator().manual_seed(3)
    values: dict[str, Any] = {
        name: torch.rand(update.shape_of(name, torch.Size([4, 5])), generator=random) + 0.1
        for name in update.tensors
        if name != "copy"
    }
    scalars = {
        **dict.fromkeys(update.rule.scalars, 0.3),
        "lr": 0.01,
        "weight_decay": 0.1,
        "grad_scale": 0.5,
        "seed": 0.0,
        "tensor_id": 2.0,
        "step": 3.0,
    }
    expected = update.run(**values, **scalars)
    result = interpret(update.program, values, scalars)
    left_alone = {name for name in expected if name not in result}
    assert set(result) | left_alone == set(expected)
    assert not left_alone or update.rule.every
    for name, value in expected.items():
        found = values[name] if name in left_alone else result[name]
        torch.testing.assert_close(found, value, rtol=0, atol=0, equal_nan=True, msg=name)


def test_scalars_are_hoisted_and_shared() -> None:
    program = Update(ADAM, Policy(decay="decoupled"), (("amsgrad", False),)).program
    assert len(program.passes) == 1
    elements = [program.nodes[i] for i in program.passes[0].elements]
    assert [node.op for node in elements if node.op in ("pow", "exp", "log")] == []
    assert len([node for node in elements if node.op == "sqrt"]) == 1  # the bias corrections' roots are scalars
    assert len([node for node in elements if node.op == "div"]) == 1  # by the denominator
    assert "step" in program.scalars
    assert "grad_scale" not in program.scalars


def test_common_subexpressions_are_one_and_dead_code_is_none() -> None:
    def rule(p: Any, g: Any, unused: Any, lr: Any, eps: Any) -> dict[str, Any]:
        lost = g / eps
        del lost
        return {"p": p - lr * (g * g) + (g * g) * lr * 0}

    program = trace(rule, tensors=("p", "g", "unused"), scalars=("lr", "eps"))
    assert program.scalars == ("lr",)
    assert program.loads == ("p", "g")
    assert sum(node.op == "mul" and node.args == (1, 1) for node in program.nodes) == 1
    assert "div" not in [node.op for node in program.nodes]
    assert program.tensors == ("p", "g", "unused")  # the calling convention stays


def test_negative_zero_is_not_zero() -> None:
    def rule(p: Any, a: Any) -> dict[str, Any]:
        return {"p": p * 0.0, "a": p * -0.0}

    program = trace(rule, tensors=("p", "a"), scalars=())
    assert len({index for _, index in program.stores}) == 2


def test_lamb_has_two_passes_and_stores_in_the_last() -> None:
    program = Update(LAMB.rule, Policy(), (("adapt", True),)).program
    first, last = program.passes
    assert [program.nodes[i].op for i in first.reductions] == ["norm", "norm"]
    assert last.reductions == ()
    stored = {index for _, index in program.stores}
    assert stored <= set(last.elements)
    # Only what the norms need is computed in the first pass; nothing that depends on them.
    assert max(program.nodes[i].stage for i in first.elements) == 0
    assert stored - set(first.elements), "the weight depends on the norms"
    assert program.reduces
    assert not Update(LAMB.rule, Policy(), (("adapt", False),)).program.reduces


def test_cautious_waits_for_its_own_mean() -> None:
    assert len(Update(ADAM, Policy(cautious=True), (("amsgrad", False),)).program.passes) == 2
    assert len(Update(LAMB.rule, Policy(cautious=True), (("adapt", True),)).program.passes) == 3


def test_results_are_returned() -> None:
    program = trace(lambda g: {"return": [ops.norm(g), ops.sum(g)]}, tensors=("g",), scalars=(), name="f")
    result = interpret(program, {"g": torch.tensor([3.0, 4.0])}, {})
    assert [float(x) for x in result.values()] == [5.0, 7.0]
    assert program.stores == ()


@pytest.mark.parametrize("where", ["element", "scalar"])
def test_a_branch_on_a_value_is_refused(where: str) -> None:
    def rule(p: Any, g: Any, lr: Any) -> dict[str, Any]:
        if (g if where == "element" else lr) > 0:
            return {"p": p}
        return {"p": p - g}

    with pytest.raises(TypeError, match="cannot branch on the value"):
        trace(rule, tensors=("p", "g"), scalars=("lr",))


def test_mistakes_in_rules_are_named() -> None:
    def traced(function: Callable[..., Any]) -> Program:
        return trace(function, tensors=("p", "g"), scalars=("lr",), name="rule")

    with pytest.raises(ValueError, match=r"unknown operation 'frobnicate'; the language has: add, sub"):
        traced(lambda p, g, lr: {"p": ops.apply("frobnicate", p)})
    with pytest.raises(KeyError, match="frobnicate"):
        ops.apply("frobnicate", vector(1.0))
    with pytest.raises(ValueError, match=r"stores \['momentum'\], but its tensors are \['p', 'g'\]"):
        traced(lambda p, g, lr: {"momentum": p})
    with pytest.raises(TypeError, match=r"norm\(\) reduces a tensor; it was given a scalar"):
        traced(lambda p, g, lr: {"p": p * ops.norm(lr)})
    with pytest.raises(TypeError, match="one branch must be element-wise"):
        traced(lambda p, g, lr: {"p": p * ops.where(g > 0, 1.0, lr)})


FINGERPRINTS = """
import itertools
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.rules import Policy, Update
for info in OPTIMIZERS.values():
    rule = info.cls.rule
    for values in itertools.product((False, True), repeat=len(rule.flags)):
        flags = tuple(sorted(zip(rule.flags, values)))
        print(Update(rule, Policy(decay="l2", cautious=True, scaled=True, copy=True), flags).program.fingerprint)
"""


def test_fingerprints_are_the_same_in_every_process() -> None:
    seen = []
    for seed in ("0", "12345"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", FINGERPRINTS], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        seen.append(run.stdout.split())
    assert seen[0] == seen[1]
    assert all(len(fingerprint) == 64 for fingerprint in seen[0])


def test_fingerprints_tell_programs_apart() -> None:
    seen: dict[str, Update] = {}
    for update in updates():
        other = seen.setdefault(update.program.fingerprint, update)
        assert str(other.program) == str(update.program)
    assert len({str(update.program) for update in updates()}) == len(seen)


def test_nodes_know_their_attributes() -> None:
    node = Node("load", (), Rate.ELEMENT, 0, (("name", "p"),))
    assert node.attr("name") == "p"
    with pytest.raises(KeyError):
        node.attr("dtype")
