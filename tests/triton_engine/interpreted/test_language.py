"""Totals over all parameters, slots of one number and what rules observe, printed to Triton."""

from __future__ import annotations

import pytest
import torch
from language.common import Meeting, give_gradients, train, values, weights

from lightning_optim.engines.scaling import LossScale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_parameters_meet(dtype: torch.dtype) -> None:
    runs, slots = [], []
    for engine in ("eager", "triton"):
        params = weights(dtype)
        optimizer = Meeting(params, engine=engine)
        optimizer.observe()
        train(optimizer, params, range(4))
        assert engine in optimizer.engine_report().splitlines()[0]
        runs.append(values(params))
        slots.append({name: float(value) for name, value in optimizer.state[params[0]].items() if not value.ndim})
        slots[-1]["observed"] = float(optimizer.observed()["length"][params[0]])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert slots[0] == pytest.approx(slots[1], rel=tolerance)


def test_a_step_that_is_left_out_changes_nothing_that_all_share() -> None:
    params = weights()
    optimizer = Meeting(params, engine="triton")
    train(optimizer, params, range(2))
    before = values(params), [value.clone() for state in optimizer.state.values() for value in state.values()]
    give_gradients(params, 2)
    assert params[0].grad is not None
    params[0].grad[0, 0] = float("inf")
    found = torch.zeros(())
    with torch.no_grad():
        optimizer._stepper.step(loss=LossScale(torch.tensor(8.0), found))
    assert found == 1
    after = values(params), [value for state in optimizer.state.values() for value in state.values()]
    for olds, news in zip(before, after, strict=True):
        for old, new in zip(olds, news, strict=True):
            assert torch.equal(old, new)


def test_clipping_and_unscaling_come_before_totals() -> None:
    runs = []
    for engine in ("eager", "triton"):
        params = weights()
        optimizer = Meeting(params, engine=engine, max_grad_norm=0.5)
        for step in range(3):
            give_gradients(params, step)
            for p in params:
                assert p.grad is not None
                p.grad *= 8
            with torch.no_grad():
                optimizer._stepper.step(loss=LossScale(torch.tensor(8.0), torch.zeros(())))
        runs.append(values(params))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
