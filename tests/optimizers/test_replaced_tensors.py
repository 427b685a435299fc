"""Weights and state that change under the optimizer: other tensors, other types, other shapes."""

from __future__ import annotations

from typing import Any

import pytest
import references
import torch
from torch import nn

from .common import assert_same, each, each_engine, known_warnings, make, parameters, train, weights

pytestmark = known_warnings


@each
@each_engine
def test_swapped_data_is_honoured(name: str, engine: str) -> None:
    params, expected = parameters(), parameters()
    optimizer, reference = make(name, params, engine=engine), make(name, expected, engine=engine)
    train(optimizer, range(2))
    train(reference, range(2))
    old = [p.data for p in params]
    kept = weights(params)
    for p in params:
        p.data = p.data.clone()
    train(optimizer, range(2, 4))
    train(reference, range(2, 4))
    assert_same(weights(params), weights(expected))
    assert_same([t.clone() for t in old], kept)


@references.common_to_all
@each
@each_engine
def test_replaced_state_is_honoured(name: str, engine: str) -> None:
    """``state[p][slot] = tensor`` between steps, in whatever type and memory order: as offloading does."""
    params, expected = (parameters(shapes=[(4, 3), (2, 3, 4, 5), (6,)]) for _ in range(2))
    optimizer, reference = make(name, params, engine=engine), make(name, expected, engine=engine)
    for step in range(8):
        for p in params:
            for slot, value in optimizer.state[p].items():
                new = [value.clone(), value.double(), value.clone(), value.to(torch.int64) if slot == "step" else value]
                optimizer.state[p][slot] = new[step % 4]
                if value.ndim == 4 and step == 2:
                    optimizer.state[p][slot] = value.to(memory_format=torch.channels_last)
                if slot == "step" and step == 6:
                    optimizer.state[p][slot] = float(value)
        train(optimizer, [step])
        train(reference, [step])
        for p, q in zip(params, expected, strict=True):
            # Slots that were made float64 above are not rounded to float32 from there on.
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for p in params:
        assert float(optimizer.state[p].get("step", 8)) == (7 if name == "soap" else 8)  # whose first one makes state


@references.common_to_all
@each
@each_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_to_another_type_after_steps(name: str, engine: str, dtype: torch.dtype) -> None:
    """The state keeps its own type, which is not narrowed."""
    model = nn.Linear(4, 3)
    optimizer = make(name, model.parameters(), engine=engine)
    train(optimizer, range(2))
    model.to(dtype)
    before = weights(model.parameters())
    train(optimizer, range(2, 4))
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.dtype == dtype
        assert not torch.equal(p, old)
        assert torch.isfinite(p).all()
        assert {v.dtype for v in optimizer.state[p].values()} == {torch.float32}


@each
@each_engine
def test_a_weight_of_another_shape_is_refused(name: str, engine: str) -> None:
    """Its state no longer fits; nothing may be written beyond the new end."""
    (p,) = parameters(shapes=[(64,)])
    optimizer = make(name, [p], engine=engine)
    train(optimizer, range(2))
    if not any(v.ndim for v in optimizer.state[p].values()):
        pytest.skip("no state that could fail to fit")
    p.grad = None
    p.data = torch.zeros(3)
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"parameter 0.*\(64,\).*\(3,\)|parameter 0.*\(3,\).*\(64,\)"):
        optimizer.step()
    assert torch.equal(p, torch.zeros(3))


@each
@each_engine
def test_a_slot_of_another_shape_is_refused(name: str, engine: str) -> None:
    (p,) = parameters(shapes=[(64,)])
    optimizer = make(name, [p], engine=engine)
    train(optimizer, range(2))
    slot = next(key for key in optimizer.state[p] if key != "step")
    optimizer.state[p][slot] = torch.zeros(3)
    before = weights([p])
    with pytest.raises(RuntimeError, match=rf"parameter 0.*{slot}.*\(3,\)"):
        train(optimizer, [2])
    assert_same(weights([p]), before)


def test_alternating_sets_of_gradients_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_optim.stepping.plan import Planner

    built: list[Planner] = []
    build = Planner.build

    def counted(planner: Planner, *args: Any) -> Any:
        built.append(planner)
        return build(planner, *args)

    monkeypatch.setattr(Planner, "build", counted)
    ends = []
    for planned_anew in (False, True):
        params = parameters(shapes=[(4, 3), (5,), (6,)])
        optimizer = make("adamw", params, engine="eager")
        for step in range(9):
            train(optimizer, [step])
            optimizer.zero_grad()
            params[step % 3].grad = torch.ones_like(params[step % 3])
            optimizer.step()
            if planned_anew:
                optimizer._stepper._plans.clear()
        ends.append(weights(params))
        if not planned_anew:
            assert len(built) <= 4 + 1  # the sets of gradients, and the first step, which makes the state
    assert_same(ends[0], ends[1])
