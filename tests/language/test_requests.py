"""What rules ask for: inputs beside the gradient, something at every n-th step, and numbers to be observed."""

from __future__ import annotations

import copy

import pytest
import torch

from .common import ENGINE, Meeting, Refreshed, give_gradients, train, values, weights


@ENGINE
def test_something_comes_at_every_third_step(engine: str) -> None:
    params = weights(torch.float64)
    expected = values(params)
    optimizer = Refreshed(params, engine=engine)
    for step in range(7):
        give_gradients(params, step)
        estimates: dict[torch.Tensor, torch.Tensor] = {p: torch.full_like(p, float(step)) for p in params}
        optimizer._stepper.step(inputs={"estimate": estimates} if step % 3 == 0 else None)
        for i, p in enumerate(params):
            assert p.grad is not None
            expected[i] = expected[i] - 0.1 * p.grad / (1 + step // 3 * 3)
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), q)
    assert optimizer.param_groups[0]["updates"] == 7


def test_what_is_missing_is_named_before_anything_is_written() -> None:
    params = weights()
    before = values(params)
    optimizer = Refreshed(params)
    give_gradients(params, 0)
    with pytest.raises(RuntimeError, match=r"parameter 0 .* its step needs 'estimate' beside the gradient"):
        optimizer.step()
    assert not optimizer.state
    assert optimizer.param_groups[0]["updates"] == 0
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)


def test_an_input_must_fit_its_parameter() -> None:
    params = weights()
    optimizer = Refreshed(params)
    give_gradients(params, 0)
    with pytest.raises(RuntimeError, match=r"'estimate' has a gradient of shape \(7,\)"):
        optimizer._stepper.step(inputs={"estimate": {p: torch.zeros(7) for p in params}})


def test_the_count_is_saved_and_resumed() -> None:
    params = weights()
    optimizer = Refreshed(params)
    for step in range(2):
        give_gradients(params, step)
        optimizer._stepper.step(inputs={"estimate": {p: torch.ones_like(p) for p in params}} if step == 0 else None)
    again = Refreshed(params)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(again, params, range(2, 3))  # the third step asks for nothing, the fourth does
    give_gradients(params, 3)
    with pytest.raises(RuntimeError, match="its step needs 'estimate'"):
        again.step()


@ENGINE
def test_what_a_rule_observes_is_kept_for_who_asks(engine: str) -> None:
    params = weights(shapes=((3, 4), (5,)))
    optimizer = Meeting(params, engine=engine)
    train(optimizer, params, range(1))
    assert optimizer.observed() == {}
    optimizer.observe()
    train(optimizer, params, range(1, 3))
    found = optimizer.observed()["length"]
    for p in params:
        assert p.grad is not None
        assert float(found[p]) == pytest.approx(float(p.grad.norm()), rel=1e-6)
