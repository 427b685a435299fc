"""The number of steps of a schedule against a simulation, and filling it into schedules and wrappers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, SequentialLR, StepLR

from lightning_optim.control.schedules.run_length import RunLength, RunProgress
from lightning_optim.control.schedules.totals import fill_total, fill_trainer_totals, needs_total
from lightning_optim.schedulers import Cosine, Linear

# ---------------------------------------------------------------- the count


def simulated(run: RunLength, interval: str, frequency: int) -> int:
    """Positions that a schedule takes at optimizer steps, by going through the run batch by batch."""
    return max(1, len({position for position, _ in gone_through(run, interval, frequency)}))


def gone_through(run: RunLength, interval: str, frequency: int) -> list[tuple[int, RunProgress]]:
    """The schedule's position at each optimizer step of a run, and where the run is after it."""
    position, steps = 0, 0
    taken: list[tuple[int, RunProgress]] = []
    batches = run.batches if run.batches is not None else 10**6
    for epoch in itertools.count():
        if epoch == run.max_epochs or (run.batches is not None and epoch > 200):
            break
        window = run.accumulate[max(begin for begin in run.accumulate if begin <= epoch)]
        for batch in range(1, batches + 1):
            if batch % window == 0 or (batch == batches and run.steps_on_last_batch):
                steps += 1
                ends = batch == batches
                taken.append((position, RunProgress(epoch + ends, 0 if ends else batch, steps)))
                if interval == "step" and batch % frequency == 0:
                    position += 1
            if steps == run.max_steps:
                return taken
        if interval == "epoch" and (epoch + 1) % frequency == 0:
            position += 1
    return taken


@pytest.mark.parametrize("accumulate", [{0: 1}, {0: 4}, {0: 3, 2: 1, 3: 4}])
@pytest.mark.parametrize("steps_on_last_batch", [True, False])
def test_count_equals_simulation(accumulate: Mapping[int, int], steps_on_last_batch: bool) -> None:
    bounds = [(5, -1), (-1, 17), (-1, 1), (4, 9), (3, 500), (1, -1)]
    for (epochs, steps), batches, interval, frequency in itertools.product(
        bounds, (1, 4, 10), ("step", "epoch"), (1, 2, 3, 5)
    ):
        if not steps_on_last_batch and batches < max(accumulate.values()):
            continue  # a window that never fills: no optimizer step is ever made
        run = RunLength(epochs, steps, batches, accumulate, steps_on_last_batch)
        got = run.schedule_steps(interval, frequency)
        assert got == simulated(run, interval, frequency), (run, interval, frequency)


@pytest.mark.parametrize("accumulate", [{0: 1}, {0: 4}, {0: 3, 2: 1, 3: 4}])
def test_what_remains_equals_simulation(accumulate: Mapping[int, int]) -> None:
    """From after any optimizer step on: the positions at the further ones."""
    for (epochs, steps), batches, interval, frequency in itertools.product(
        [(5, -1), (-1, 17), (4, 9)], (4, 10, None), ("step", "epoch"), (1, 2, 3)
    ):
        if batches is None and (interval == "epoch" or steps == -1):
            continue
        run = RunLength(epochs, steps, batches, accumulate)
        through = gone_through(run, interval, frequency)
        for number, (_, done) in enumerate(through[:-1], start=1):
            further = {position for position, _ in through[number:]}
            assert run.schedule_steps(interval, frequency, done) == len(further), (run, interval, frequency, done)


@pytest.mark.parametrize("frequency", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_count_of_an_endless_loader(window: int, frequency: int) -> None:
    run = RunLength(max_steps=17, accumulate={0: window})
    assert run.schedule_steps("step", frequency) == simulated(run, "step", frequency)


def test_count_by_epochs_needs_no_length() -> None:
    assert RunLength(max_epochs=7).schedule_steps("epoch", 2) == 4


def test_count_with_nothing_to_do_is_one() -> None:
    for run in (RunLength(0, -1, 10), RunLength(-1, 0, 10), RunLength(3, -1, 0), RunLength(-1, 0)):
        assert run.schedule_steps() == 1


@pytest.mark.parametrize(
    ("run", "interval", "message"),
    [
        (RunLength(-1, -1, 10), "step", r"no end \(max_epochs=-1 and max_steps=-1\)"),
        (RunLength(3, -1), "step", "no length, .* max_steps is needed"),
        (RunLength(-1, 9), "epoch", "no length, .* max_epochs is needed"),
        (RunLength(3, 9, 10), "batch", "interval='batch' must be 'step' or 'epoch'"),
    ],
)
def test_count_that_cannot_be_known(run: RunLength, interval: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run.schedule_steps(interval)


# ---------------------------------------------------------------- filling


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def test_only_unknown_totals_are_filled() -> None:
    unknown, given = Linear(sgd()), Linear(sgd(), total_steps=3)
    for schedule in (unknown, given):
        fill_total(schedule, 8)
    assert (unknown.total_steps, given.total_steps) == (8, 3)
    assert needs_total(unknown)
    assert not needs_total(given)
    fill_total(unknown, 9)
    assert unknown.total_steps == 9
    fill_total(StepLR(sgd(), 1), 8)  # not ours: left alone


def test_sequential_phases_get_the_distance_between_milestones() -> None:
    optimizer = sgd()
    parts = [Linear(optimizer, 0.5), Cosine(optimizer, 0.5), Linear(optimizer)]
    sequence = SequentialLR(optimizer, list(parts), milestones=[4, 10])
    fill_total(sequence, 15)
    assert [part.total_steps for part in parts] == [4, 6, 5]
    # Half of 4 steps is the warmup, of which the wrapper's own copy has to know too; that of the second phase
    # must not show yet.
    assert sequence.get_last_lr() == [optimizer.param_groups[0]["lr"]] == [1 / 3]
    seen = []
    for _ in range(16):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        sequence.step()
    want = [Linear(sgd(), 2, 4).factor(t) for t in range(4)]
    want += [Cosine(sgd(), 3, 6).factor(t) for t in range(6)]
    want += [Linear(sgd(), 0, 5).factor(t) for t in range(6)]
    assert seen == want


def test_sequential_phase_beyond_the_run_does_no_harm() -> None:
    optimizer = sgd()
    last = Cosine(optimizer)
    fill_total(SequentialLR(optimizer, [Linear(optimizer), last], milestones=[100]), 60)
    assert last.total_steps == 1


def test_chained_schedules_get_the_whole_and_keep_their_product() -> None:
    optimizer = sgd()
    ours = Cosine(optimizer, 3)
    chain = ChainedScheduler([ours, ConstantLR(optimizer, factor=0.5, total_iters=3)])
    fill_total(chain, 20)
    assert ours.total_steps == 20
    assert chain.get_last_lr() == [optimizer.param_groups[0]["lr"]] == [0.125]


# ---------------------------------------------------------------- a trainer's bounds


def test_strategy_that_accumulates_by_itself_makes_no_step_on_a_partial_window() -> None:
    trainer = SimpleNamespace(
        max_epochs=2,
        max_steps=-1,
        num_training_batches=10,
        accumulate_grad_batches=4,
        callbacks=[],
        strategy=SimpleNamespace(handles_gradient_accumulation=True),
    )
    assert RunLength.of_trainer(trainer) == RunLength(2, -1, 10, {0: 4}, steps_on_last_batch=False)


def test_manual_optimization_is_left_to_the_user() -> None:
    trainer = SimpleNamespace(lightning_module=SimpleNamespace(automatic_optimization=False))
    fill_trainer_totals(trainer)  # looks at nothing else
