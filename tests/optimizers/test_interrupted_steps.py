"""Whatever comes in between, and wherever, a step has been taken or it has not; and the next one is right."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interrupting import Interrupted
from torch import Tensor, nn

import lightning_optim
from lightning_optim.control.step_in_backward import StepInBackward
from lightning_optim.engines.foreach import ForeachEngine
from lightning_optim.engines.progress import IncompleteStepError
from lightning_optim.stepping.stepper import Stepper
from lightning_optim.stepping.undo import UndoBuffers

from .common import assert_same, known_warnings
from .two_buckets import Run

pytestmark = known_warnings

each_engine = pytest.mark.parametrize("engine", ["eager", "foreach", "host"])


def test_an_interrupt_while_weights_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = torch._foreach_copy_, []

    def interrupted(*args: Any) -> Any:
        result = write(*args)
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return result

    straight, run = Run("adamw", "foreach"), Run("adamw", "foreach")
    straight.step(0)
    monkeypatch.setattr(torch, "_foreach_copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.step(0)
    assert_same(run.contents(), straight.contents())


@each_engine
def test_no_memory_for_the_state_of_the_second_weight(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros, calls = torch.zeros_like, []

    def scarce(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no memory")
        return zeros(*args, **options)

    straight, run = Run("sgd", engine), Run("sgd", engine)
    straight.step(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros_like", scarce)
        with pytest.raises(MemoryError):
            run.step(0)
    assert not run.optimizer.state
    run.step(0)
    assert_same(run.contents(), straight.contents())


def test_a_slot_that_a_failed_step_has_added_goes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for fails in (False, True):
        weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = lightning_optim.SGD([weight], lr=0.1, rounding="kahan")
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        optimizer.param_groups[0].update(momentum=0.9, dampening=0.5)  # whose first step is special
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(Stepper, "run", lambda *_: [].pop())
                with pytest.raises(IndexError):
                    optimizer.step()
            assert set(optimizer.state[weight]) == {"kahan_compensation"}
        optimizer.step()
        ends.append((weight.detach(), dict(optimizer.state[weight])))
    assert_same(ends[0], ends[1])


def test_what_cannot_be_finished_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = ForeachEngine._computed

    def scarce(bucket: Any, *args: Any) -> Any:
        if bucket.layout.math == torch.float64:
            raise MemoryError("no memory")
        return compute(bucket, *args)

    run = Run("adamw", "foreach")
    monkeypatch.setattr(ForeachEngine, "_computed", staticmethod(scarce))
    with pytest.raises(
        IncompleteStepError, match=r"could not be finished \(MemoryError.*valid: go on from a checkpoint"
    ):
        run.step(0)


def test_the_largest_part_comes_first() -> None:
    """So that what has no memory has written nothing yet."""
    from lightning_optim.engines import foreach

    params = [nn.Parameter(torch.zeros(size)) for size in (2, 9, 4)]
    groups = [{"params": [p], "lr": 0.1 * (1 + i)} for i, p in enumerate(params)]
    optimizer = lightning_optim.SGD(groups, engine="foreach")
    for p in params:
        p.grad = torch.ones_like(p)
    found: list[Any] = []
    parts = foreach._parts

    def noted(bucket: Any) -> Any:
        found.append(parts(bucket))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreach, "_parts", noted)
        optimizer.step()
    assert found == [[[1], [2], [0]]]


def test_an_undoing_that_is_interrupted_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    run, buffers = Run("adamw", "eager"), UndoBuffers()
    run.step(0)
    before = run.contents()
    stepper = run.optimizer._stepper
    for at in range(12):
        with torch.no_grad():
            stepper.plan(undo=buffers)
            stepper.run(None)
        calls: list[int] = []
        give_back = UndoBuffers.give_back

        def cut_short(*args: Any, at: int = at, give_back: Any = give_back, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == at + 2:
                raise Interrupted
            give_back(*args)

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(UndoBuffers, "give_back", cut_short)
            try:
                stepper.undo()
            except Interrupted:
                assert len(calls) > at
        assert_same(run.contents(), before)


@pytest.mark.parametrize("whole", [True, False], ids=["in finish", "in the backward pass"])
def test_a_gradient_that_a_step_in_the_backward_pass_has_used_is_not_used_again(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = nn.Parameter(torch.zeros(2))
    backward = StepInBackward(lightning_optim.SGD([weight], lr=1.0))

    def window() -> None:
        weight.sum().backward()
        backward.finish()

    if not whole:
        window()
    wanted = -1.0 if whole else -2.0
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "_end", interrupted(Stepper._end))
        with pytest.raises(Interrupted):
            window()
    assert weight.grad is None
    assert weight.tolist() == [wanted] * 2
    backward.finish()
    assert weight.tolist() == [wanted] * 2
    backward.discard()
    window()
    assert weight.tolist() == [wanted - 1] * 2


def interrupted(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        method(*args)
        raise Interrupted

    return call
