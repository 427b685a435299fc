"""Numbers at their edge: directions that are denormal or huge, and step counts beyond what float32 counts to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_optim.optimizers import SGDOptim
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.rules.counting import COUNTABLE, next_step
from lightning_optim.rules.rounding import noise_key
from lightning_optim.stepping.undo import UndoBuffers

from .common import ENGINE, running_engines, saved_and_loaded


@ENGINE
@pytest.mark.parametrize("size", [1e-42, 1e-37, 1e-30, 1e-20, 1.0, 1e15])
@pytest.mark.parametrize("lr", [1e-3, 1.0])
def test_a_step_of_lamb_has_the_length_that_its_weights_say(lr: float, size: float, engine: str) -> None:
    """Whatever the direction's length is: the ratio alone may be more than float32 holds, or less."""
    w = nn.Parameter(torch.full((1, 4), 100.0))
    optimizer = OPTIMIZERS["lamb"].create([w], lr=lr, eps=1.0 if size < 1 else 1e-6, weight_decay=0.0, engine=engine)
    w.grad = torch.full((1, 4), size)
    optimizer.step()
    rest = float(100 - w[0, 0].double())
    assert rest == pytest.approx(lr * 100, rel=1e-3)  # denormal numbers have few bits


@ENGINE
def test_a_huge_decay_in_lamb_changes_the_direction_but_not_the_length(engine: str) -> None:
    w = nn.Parameter(torch.full((2, 2), 1e-3))
    optimizer = OPTIMIZERS["lamb"].create([w], lr=0.1, weight_decay=1e35, engine=engine)
    w.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((2, 2), 0.9e-3), rtol=1e-5, atol=0)


@ENGINE
def test_a_learning_rate_beyond_float32_is_infinite_on_all_engines(engine: str) -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS["adamw"].create([w], lr=1e39, weight_decay=0.0, engine=engine)
    w.grad = torch.tensor([1.0, -1.0, 1e-3])
    optimizer.step()
    assert w.tolist() == [-math.inf, math.inf, -math.inf]


@ENGINE
@pytest.mark.parametrize("name", ["sgd", "lion"])
def test_the_cautious_mask_does_not_depend_on_how_small_a_gradient_is(name: str, engine: str) -> None:
    ends = []
    for scale in (1.0, 1e-24):
        w = nn.Parameter(torch.zeros(4))
        optimizer = OPTIMIZERS[name].create([w], lr=1e-3, cautious=True, weight_decay=0.0, engine=engine)
        w.grad = torch.tensor([1.0, -2.0, 0.0, 3.0]) * scale
        optimizer.step()
        ends.append(w.detach() if name == "lion" else w.detach() / scale)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("start", [COUNTABLE - 3, COUNTABLE, 2.0**25 - 4, 5e9], ids=str)
def test_noise_is_another_at_every_step_and_the_same_on_all_engines(start: float) -> None:
    ends: dict[str, list[Tensor]] = {}
    for engine in running_engines():
        w = nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
        optimizer = SGDOptim([w], lr=2.0**-10, rounding="stochastic", engine=engine)
        w.grad = torch.ones_like(w)
        optimizer.step()
        optimizer.state[w]["step"].fill_(start)
        moves = []
        for step in range(6):
            if step == 3:
                saved = saved_and_loaded(optimizer)
                optimizer = SGDOptim([w], lr=2.0**-10, rounding="stochastic", engine=engine)
                optimizer.load_state_dict(saved)
            with torch.no_grad():
                w.fill_(1.0)
            optimizer.step()
            moves.append(w.detach() < 1)
        ends[engine] = [*moves, optimizer.state[w]["step"]]
    for moves in ends.values():
        assert all(map(torch.equal, moves, ends["eager"]))
    patterns = {tuple(move.tolist()) for move in ends["eager"][:-1]}
    assert len(patterns) == 6, "the same noise twice"
    assert all(100 < sum(pattern) < 160 for pattern in patterns)  # a quarter of 512: a bfloat16 step is 2^-8 there


def test_no_two_steps_have_the_same_counter_or_noise() -> None:
    step, counters = COUNTABLE - 5, []
    for _ in range(1000):
        step = next_step(step)
        counters.append(step)
    assert counters == sorted(set(counters))
    assert all(torch.tensor(x).item() == x for x in counters)
    assert len({noise_key(0.0, 1.0, x, 0.0) for x in counters}) == 1000
    assert math.isinf(next_step(math.inf))


@ENGINE
@pytest.mark.parametrize("start", [3.0, COUNTABLE - 1, COUNTABLE, COUNTABLE + 2])
def test_a_step_that_is_taken_back_is_counted_back(start: float, engine: str) -> None:
    w = nn.Parameter(torch.ones(8))
    optimizer = OPTIMIZERS["adamw"].create([w], lr=0.1, engine=engine)
    w.grad = torch.ones(8)
    optimizer.step()
    optimizer.state[w]["step"].fill_(start)
    before = w.detach().clone()
    with torch.no_grad():
        assert optimizer._stepper.plan(undo=UndoBuffers())
        optimizer._stepper.run(None)
        assert float(optimizer.state[w]["step"]) == next_step(start)
        optimizer._stepper.undo()
    assert float(optimizer.state[w]["step"]) == start
    assert torch.equal(w, before)
