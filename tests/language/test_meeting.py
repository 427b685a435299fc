"""Totals over all parameters, slots that these share, and slots of one number."""

from __future__ import annotations

import builtins
import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim.rules import Policy, Rule, Slot, Update
from lightning_optim.rules.ops import mean, norm, sum, total
from lightning_optim.stepping.undo import UndoBuffers

from .common import ENGINE, Meeting, give_gradients, meeting, train, values, weights


def by_hand(steps: int) -> tuple[list[torch.Tensor], dict[str, float]]:
    """The same in plain float64."""
    ps = [p.detach() for p in weights(torch.float64)]
    p0, lengths = [p.clone() for p in ps], [1.0] * len(ps)
    scale, travelled = 0.5, 0.0
    for step in range(steps):
        holders = weights(torch.float64)
        give_gradients(holders, step)
        gs = [p.grad for p in holders if p.grad is not None]
        travelled = 0.9 * travelled + builtins.sum(
            (step + 1) * float((g * (a - p)).sum()) for g, a, p in zip(gs, p0, ps, strict=True)
        )
        scale = max(scale, travelled / builtins.sum(float(g.abs().sum()) / (1 + abs(travelled)) for g in gs))
        for i, g in enumerate(gs):
            lengths[i] = 0.5 * lengths[i] + float(g.norm())
            ps[i] = ps[i] * (1 - scale * 0.1 * 0.1) - scale * 0.1 * g / lengths[i]
    return ps, {"scale": scale, "travelled": travelled, "length": lengths[0]}


@ENGINE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_parameters_meet_before_any_moves(engine: str, dtype: torch.dtype) -> None:
    params = weights(dtype)
    optimizer = Meeting(params, engine=engine)
    train(optimizer, params, range(5))
    expected, numbers = by_hand(5)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12}[dtype]
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().double(), q, rtol=tolerance, atol=tolerance)
    for name, number in numbers.items():
        assert float(optimizer.state[params[0]][name]) == pytest.approx(number, rel=tolerance)
    assert engine in optimizer.engine_report()


@ENGINE
def test_what_all_share_is_one_tensor_also_after_loading_and_for_who_joins(engine: str) -> None:
    params = weights()
    optimizer = Meeting(params[:3], engine=engine)
    train(optimizer, params[:3], range(2))
    again = Meeting(params[:3], engine=engine)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.add_param_group({"params": params[3:]})
    train(again, params, range(2, 4))
    shared = {id(again.state[p]["scale"]) for p in params}
    assert len(shared) == 1
    assert float(again.state[params[4]]["scale"]) >= float(optimizer.state[params[0]]["scale"])


@ENGINE
def test_a_run_that_is_resumed_goes_on_bit_for_bit(engine: str) -> None:
    params, others = weights(), weights()
    optimizer = Meeting(params, engine=engine)
    train(optimizer, params, range(6))
    first = Meeting(others, engine=engine)
    train(first, others, range(3))
    second = Meeting(others, engine=engine)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, others, range(3, 6))
    for a, b in zip(values(params), values(others), strict=True):
        assert torch.equal(a, b)


def test_what_all_share_has_one_type_whoever_comes_first() -> None:
    params = [*weights(shapes=((3,),)), *weights(torch.float64, shapes=((2,),))]
    optimizer = Meeting(params)
    train(optimizer, params, range(2))
    again = Meeting(params)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (optimizer, again):
        assert {one.state[p]["scale"].dtype for p in params} == {torch.float64}
    assert torch.equal(again.state[params[0]]["scale"], optimizer.state[params[1]]["scale"])


def test_a_parameter_without_a_gradient_keeps_up_with_what_all_share() -> None:
    params = weights()
    optimizer = Meeting(params)
    train(optimizer, params, range(2))
    give_gradients(params, 2)
    params[0].grad = None
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["travelled"], optimizer.state[params[1]]["travelled"])
    assert float(optimizer.state[params[0]]["step"]) == 2


@ENGINE
def test_a_step_is_taken_back_with_what_all_share(engine: str) -> None:
    params = weights()
    optimizer = Meeting(params, engine=engine)
    train(optimizer, params, range(2))
    before = values(params), copy.deepcopy(optimizer.state_dict()["state"])
    give_gradients(params, 2)
    stepper = optimizer._stepper
    assert stepper.plan(undo=UndoBuffers())
    with torch.no_grad():
        stepper.run(None)
        assert not torch.equal(values(params)[0], before[0][0])
        stepper.undo()
    for a, b in zip(values(params), before[0], strict=True):
        assert torch.equal(a, b)
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, before[1][key][name]), name


def test_a_total_is_of_elements_or_of_numbers_per_tensor() -> None:
    def twice(p: Any, g: Any, *, lr: Any) -> Any:
        return total(total(g)) * g

    with pytest.raises(TypeError, match=r"total\(\) is over elements, or over one number for each tensor"):
        Update(Rule(twice), Policy()).program  # noqa: B018 - tracing is what raises


def test_a_shared_slot_is_made_of_what_is_shared() -> None:
    def own(p: Any, g: Any, scale: Any, *, lr: Any) -> Any:
        return g, lr * scale

    rule = Rule(own, slots={"scale": Slot(rate="shared")})
    with pytest.raises(TypeError, match="stores a scalar in scale, which is a shared"):
        Update(rule, Policy()).program  # noqa: B018 - tracing is what raises
    assert Update(Rule(own, slots=rule.slots, shared=("lr",)), Policy()).program.shared is not None


def test_sums_of_parts_are_told_from_what_needs_the_whole_tensor() -> None:
    def rule(of: Any) -> Any:
        return Update(Rule(lambda p, g, *, lr: total(of(p, g, lr)) * g), Policy()).program.phases[0].program

    assert rule(lambda p, g, lr: lr * sum(g * p) - sum(g) / 2).adds_up
    assert not rule(lambda p, g, lr: norm(g)).adds_up
    assert not rule(lambda p, g, lr: lr / sum(g)).adds_up
    assert not rule(lambda p, g, lr: sum(g) + lr).adds_up
    assert not rule(lambda p, g, lr: sum(g * mean(g))).adds_up


def test_phases_follow_one_another() -> None:
    update = Update(Rule(meeting, slots=Meeting.rule.slots, shared=Meeting.rule.shared, observe=("length",)), Policy())
    assert [phase.names for phase in update.program.phases] == [("total_0",), ("total_1",)]
    assert "travelled" not in update.program.tensors


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.1}, {"rounding": "kahan"}, {"rounding": "stochastic"}])
def test_policies_go_with_it(options: dict[str, Any]) -> None:
    runs = []
    for engine in ("eager", "foreach", "auto"):
        params = weights(torch.bfloat16)
        optimizer = Meeting(params, engine=engine, **options)
        train(optimizer, params, range(4))
        runs.append([p.detach().float() for p in params])
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)  # a bfloat16 apart, where sums round otherwise


def test_an_interrupt_leaves_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights(shapes=((3,), (4,)))
    optimizer, expected = Meeting(params, engine="eager"), [nn.Parameter(p.detach().clone()) for p in params]
    other = Meeting(expected, engine="eager")
    train(other, expected, range(1))
    calls = {"count": 0}
    copy_ = torch.Tensor.copy_

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls["count"] += 1
        if calls["count"] == 3:
            raise KeyboardInterrupt
        return copy_(self, *args, **kwargs)

    give_gradients(params, 0)
    optimizer._stepper.plan()
    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        optimizer._stepper.run(None)
    monkeypatch.undo()
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q)
        for name, value in other.state[q].items():
            assert torch.equal(optimizer.state[p][name], value), name
