"""Counting the steps of runs whose windows depend on steps, or go on over epochs, against a walk batch by batch."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from lightning_optim.control.accumulation import Accumulator
from lightning_optim.control.schedules.run_length import RunLength, RunProgress
from lightning_optim.control.schedules.windows import Windows


def walked(run: RunLength, batches: int, frequency: int, start: RunProgress) -> tuple[list[int], list[int], int]:
    """The schedule's steps before each optimizer step, the epochs of these, and how many optimizer steps there are."""
    assert run.windows is not None
    windows = run.windows
    accumulator = Accumulator(dict(windows.lengths), windows.by, across_epochs=windows.across_epochs)
    if start.rest:
        accumulator.load_state_dict(
            {"epoch": start.epochs, "step": start.steps, "position": 1, "length": 1 + start.rest, "reference": None}
        )
    step, calls, before, epochs = start.steps, 0, [], []
    for epoch in itertools.count(start.epochs):
        if epoch == run.max_epochs:
            break
        if epoch > start.epochs and not windows.across_epochs:
            accumulator.drop()
        for batch in range(start.batches if epoch == start.epochs else 0, batches):
            ends = batch + 1 == batches and (not windows.across_epochs or epoch + 1 == run.max_epochs)
            accumulator.begin(epoch=epoch, step=step, ends=ends)
            accumulator.contribute(None, None, [])
            if accumulator.steps:
                before.append(calls)
                epochs.append(epoch)
                step += 1
                calls += (batch + 1) % frequency == 0
                if step == run.max_steps:
                    return before, epochs, step
    return before, epochs, step


def test_against_a_walk_batch_by_batch() -> None:
    generator = random.Random(0)  # noqa: S311
    seen = set()
    for _ in range(400):
        by = generator.choice(["epoch", "step"])
        lengths = {0: generator.randint(1, 6)}
        lengths |= {generator.randint(1, 9): generator.randint(1, 6) for _ in range(generator.randint(0, 3))}
        windows = Windows.checked("test", lengths, by, generator.random() < 0.5)
        batches, frequency = generator.randint(1, 9), generator.randint(1, 4)
        max_steps = generator.choice([-1, generator.randint(1, 12)])
        max_epochs = generator.randint(1, 6) if max_steps == -1 else generator.choice([-1, generator.randint(1, 6)])
        run = RunLength(max_epochs, max_steps, batches, windows=windows)
        progress = RunProgress()
        if generator.random() < 0.5 and max_epochs != 1:
            progress = RunProgress(1, generator.randint(0, batches - 1), 2, generator.randint(0, 2))
        if max_steps != -1 and max_steps <= progress.steps:
            continue
        start = progress
        if progress.batches == 0 and not windows.across_epochs:
            start = RunProgress(progress.epochs, 0, progress.steps)
        before, epochs, steps = walked(run, batches, frequency, start)
        case = (run, frequency, progress)
        expected = before[-1] + 1 if before else 1
        assert run.schedule_steps("step", frequency, progress) == expected, case
        last = epochs[-1] if epochs else progress.epochs
        expected = last // frequency - progress.epochs // frequency + 1
        assert run.schedule_steps("epoch", frequency, progress) == expected, case
        if progress == RunProgress():
            assert run.schedule_steps() == steps
        seen.add((by, windows.across_epochs, progress.rest > 0))
    assert len(seen) == 8


def test_windows_by_epoch_are_counted_as_they_were() -> None:
    lengths = {0: 3, 2: 4, 5: 1}
    for batches, frequency in itertools.product((1, 5, 8), (1, 2, 3)):
        usual = RunLength(7, -1, batches, lengths)
        ours = RunLength(7, -1, batches, windows=Windows(lengths))
        for interval in ("step", "epoch"):
            assert ours.schedule_steps(interval, frequency) == usual.schedule_steps(interval, frequency)


def test_a_long_run_is_counted_at_once() -> None:
    run = RunLength(3, -1, 10**9, windows=Windows({0: 1, 1000: 2, 10**6: 8}, "step", True))
    begun = time.perf_counter()
    assert run.schedule_steps() == 10**6 + -(-(3 * 10**9 - 1000 - 2 * (10**6 - 1000)) // 8)
    assert time.perf_counter() - begun < 1


def test_data_without_a_length() -> None:
    windows = Windows({0: 2, 5: 3}, "step")
    assert RunLength(-1, 20, None, windows=windows).schedule_steps() == 20
    assert RunLength(4, 20, None, windows=windows).schedule_steps("epoch") == 4
    with pytest.raises(ValueError, match="has no length"):
        RunLength(4, -1, None, windows=windows).schedule_steps()
