"""Weights, state, gradients and copies that share memory: as the eager engine has it, tensor after tensor."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim.engines import ENGINES
from lightning_optim.engines.memory import extent, is_dense, overlaps_itself, ranges
from lightning_optim.stepping.method import Options
from lightning_optim.stepping.stepper import Stepper

from .common import known_warnings

pytestmark = [
    known_warnings,
    pytest.mark.filterwarnings("ignore:.*engine cannot be used:lightning_optim.warnings.LightningOptimWarning"),
]

SIZE = 20_000  # more than one chunk of the host engine, and more than one thread of its


def values(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def shared_slot(optimizer: Any, p: nn.Parameter, q: nn.Parameter) -> None:
    optimizer.state[q]["exp_avg"] = optimizer.state[p]["exp_avg"]


def shifted_slots(optimizer: Any, p: nn.Parameter, q: nn.Parameter) -> None:
    buffer = values(SIZE + 1, 7).abs()
    optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"] = buffer[1:], buffer[:-1]


def slot_that_is_the_weight(optimizer: Any, p: nn.Parameter, q: nn.Parameter) -> None:
    optimizer.state[p]["exp_avg"] = p.detach()


def slot_over_another_weight(optimizer: Any, p: nn.Parameter, q: nn.Parameter) -> None:
    optimizer.state[p]["exp_avg"] = q.detach()


def gradient_over_the_weight(optimizer: Any, p: nn.Parameter, q: nn.Parameter) -> None:
    buffer = values(SIZE + 1, 8)
    p.grad = None
    p.data, p.grad = buffer[1:], buffer[:-1]


def gradient_over_another_weight(optimizer: Any, p: nn.Parameter, q: nn.Parameter) -> None:
    q.grad = p.detach()  # which is stepped first


def gradient_that_is_a_slot(optimizer: Any, p: nn.Parameter, q: nn.Parameter) -> None:
    q.grad = optimizer.state[p]["exp_avg"]


def weights_tied(optimizer: Any, p: nn.Parameter, q: nn.Parameter) -> None:
    q.data = p.data


def counters_shared(optimizer: Any, p: nn.Parameter, q: nn.Parameter) -> None:
    optimizer.state[q]["step"] = optimizer.state[p]["step"]


CASES: list[Callable[..., None]] = [
    shared_slot,
    shifted_slots,
    slot_that_is_the_weight,
    slot_over_another_weight,
    gradient_over_the_weight,
    gradient_over_another_weight,
    gradient_that_is_a_slot,
    weights_tied,
    counters_shared,
]


@cache
def run(case: Callable[..., None], engine: str) -> tuple[list[Tensor], str]:
    p, q = (nn.Parameter(values(SIZE, seed)) for seed in (0, 1))
    optimizer = lightning_optim.AdamW([p, q], lr=0.1, engine=engine)
    report = ""
    for step in range(4):
        p.grad, q.grad = values(SIZE, 10 + step), values(SIZE, 20 + step)
        if step == 2:
            case(optimizer, p, q)
        optimizer.step()
        if step == 2:
            report = optimizer.engine_report()
    return [p.detach(), q.detach()], report


@pytest.mark.parametrize("engine", ["foreach", "host"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_memory_that_is_shared_from_a_planned_step_on(case: Callable[..., None], engine: str) -> None:
    got, report = run(case, engine)
    wanted, _ = run(case, "eager")
    assert "eager (in place of" in report, report
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_may_share_memory_with_each_other() -> None:
    p, q, g = (nn.Parameter(torch.zeros(8)) for _ in range(3))
    optimizer = lightning_optim.SGD([p, q], lr=1.0, engine="host")
    for memory in (torch.ones(8), torch.ones(8)):
        p.grad = q.grad = memory
        optimizer.step()
    assert p.tolist() == q.tolist() == [-2.0] * 8
    assert "eager" not in optimizer.engine_report()
    del g


def test_a_gradient_that_lay_over_a_weight_does_not_make_later_steps_slow() -> None:
    p = nn.Parameter(torch.ones(8))
    optimizer = lightning_optim.SGD([p], lr=1.0, engine="host")
    kinds = []
    for step in range(5):
        p.grad = p.detach() if step == 2 else torch.ones(8)
        optimizer.step()
        kinds.append("eager" in optimizer.engine_report().splitlines()[0])
    if ENGINES["host"].unavailable() is None:
        assert kinds == [False, False, True, False, False]
    assert p.tolist() == [-2.0] * 8  # 1, 0, -1, then -1 - -1, and twice -1


def test_copies_that_lie_over_weights() -> None:
    ends = []
    for engine in ("eager", "host"):
        memory = torch.arange(10.0)
        p, q = nn.Parameter(torch.zeros(4)), nn.Parameter(memory[:4])
        owner = lightning_optim.SGD([p, q], lr=1.0, engine=engine)
        stepper = Stepper(owner, type(owner), Options(engine=engine))
        with torch.no_grad():
            for step in range(3):
                over = memory[2:6] if step else torch.zeros(4)
                stepper.step({p: torch.ones(4), q: torch.ones(4)}, {p: over, q: torch.zeros(4)})
        ends.append(memory)
    assert torch.equal(*ends)


def test_what_is_expanded_is_refused() -> None:
    weight = nn.Parameter(torch.ones(1, 3).expand(4, 3))
    with pytest.raises(ValueError, match=r"parameter 0 of the group.*its elements share memory \(strides \(0, 1\)\)"):
        lightning_optim.AdamW([weight])
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = lightning_optim.AdamW([weight])
    for _ in range(2):
        weight.grad = torch.ones(1, 3).expand(4, 3)  # only read
        optimizer.step()
    weight.data = torch.ones(1, 3).expand(4, 3)
    with pytest.raises(RuntimeError, match=r"parameter 0 .* cannot be stepped: its elements share memory"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(4, 3), (6, 3)])
def test_expanded_state_gets_memory_of_its_own(shape: tuple[int, int]) -> None:
    weight = nn.Parameter(torch.ones(6, 6)[: shape[0], : shape[1]])  # with gaps
    optimizer = lightning_optim.SGD([weight], lr=1.0, momentum=0.5)
    for step in range(3):
        weight.grad = torch.ones(shape)
        if step:
            optimizer.state[weight]["momentum_buffer"] = torch.full((1, 1), float(step)).expand(shape)
        optimizer.step()
    assert torch.equal(weight, torch.full(shape, 1 - 1 - 1.5 - 2.0))


def test_ranges_meet_exactly_where_numbers_do() -> None:
    from lightning_optim.engines.host.reader import native_meet

    generator = torch.Generator().manual_seed(0)
    native = native_meet()
    for _ in range(300):
        begins = torch.randint(0, 40, (4,), generator=generator).tolist()
        lengths = torch.randint(0, 6, (4,), generator=generator).tolist()
        sets = [set(range(b, b + n)) for b, n in zip(begins, lengths, strict=True)]
        found = ranges(begins[:3], lengths[:3])
        assert (found is None) == (sum(map(len, sets[:3])) > len(set.union(*sets[:3])))
        if found is not None:
            meets = bool(set.union(*sets[:3]) & sets[3])
            assert found.meet(begins[3:], lengths[3:]) == meets
            if native is not None:
                assert native(found.bounds, array("q", begins[3:]), array("q", lengths[3:])) == meets


def test_how_far_tensors_reach() -> None:
    base = torch.zeros(12)
    views = [base, base.view(3, 4).t(), base[::3], base[:0], base.view(3, 4)[:, 1:3], torch.zeros(())]
    assert [extent(t) for t in views] == [48, 48, 40, 0, 40, 4]
    assert not any(map(overlaps_itself, views))
    assert overlaps_itself(torch.zeros(1).expand(3))
    assert overlaps_itself(base.as_strided((3, 3), (1, 1)))
    assert not overlaps_itself(base.as_strided((3, 2), (2, 3)))  # 0 2 4 and 3 5 7
    assert not is_dense(base.as_strided((3, 2), (2, 3)))
