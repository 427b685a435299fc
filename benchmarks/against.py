"""The host step of two checkouts, turn by turn: is the one that was changed slower than the one before?

Two processes, each with the package and the benchmark of its own checkout, have the same tensors and the same cores.
They are asked by turns for a burst of steps, first the one and then the other, and in the next round the other first;
what is reported of a row is the median of the rounds' ratios. How memory lies is drawn anew when a process starts, and
may be worth some percent: so processes are started several times, and the spread of their medians is shown. The rows of
torch, which are the same code in both, show what the machine does by itself.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

#: How long the timed steps of one turn take, at least one step.
BURST_SECONDS = 0.01

#: Rounds of each start, whatever time they take; an even number, so that each is first as often as the other.
LEAST_ROUNDS = 4

#: Threads of a step spin for some milliseconds after it, which must not be the other's time.
PAUSE_SECONDS = 0.005

Row = tuple[str, str]


class Checkout:
    """A process that has one checkout's contenders, and runs one of them when it is asked to.

    Args:
        path: Root of the checkout.
        total: Weights, as of ``gpt2_shapes``.

    Attributes:
        rows: Job and name of each contender.
    """

    def __init__(self, path: Path, total: float | None) -> None:
        self._path = path
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(path.resolve()), json.dumps(total)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.rows: list[Row] = [(job, name) for job, name in self._answer()]

    def __enter__(self) -> Checkout:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def turn(self, row: Row) -> float:
        """Seconds that a step takes now."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self.rows.index(row)}\n")
        self._process.stdin.flush()
        seconds = float(self._answer())
        time.sleep(PAUSE_SECONDS)
        return seconds

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self._path} ended")
        return json.loads(line)


def report(ours: Path, other: Path, sizes: list[str], *, rounds: int, seconds: float, starts: int) -> str:
    """Compare two checkouts.

    Args:
        ours: Root of the one that may be slower.
        other: Root of the one before.
        sizes: Labels of numbers of weights.
        rounds: At most so many for each size.
        seconds: About how long each size may take.
        starts: Pairs of processes for each size, one after the other.

    Returns:
        A table.
    """
    from common import weights  # not above: in the processes of checkouts it is another one

    lines = [
        f"{ours.resolve()}, compared with {other.resolve()}",
        "",
        "| weights | job | step | before, ms | after, ms | after/before | of each start |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        found: dict[Row, list[list[tuple[float, float]]]] = {}
        for _ in range(starts):
            with ExitStack() as stack:
                pair = [stack.enter_context(Checkout(path, weights(size))) for path in (other, ours)]
                for row, times in _take_turns(pair, max(1, rounds // starts), seconds / starts).items():
                    found.setdefault(row, []).append(times)
        for (job, name), columns in found.items():
            before, after = zip(*(turn for column in columns for turn in column), strict=True)
            ratios = [statistics.median(b / a for a, b in column) for column in columns]
            together = statistics.median(b / a for a, b in zip(before, after, strict=True))
            lines.append(
                f"| {size} | {job} | {name} | {statistics.median(before) * 1e3:.3f} "
                f"| {statistics.median(after) * 1e3:.3f} | {together:.3f} | {min(ratios):.3f} to {max(ratios):.3f} |"
            )
    return "\n".join([*lines, ""])


def _take_turns(pair: list[Checkout], rounds: int, seconds: float) -> dict[Row, list[tuple[float, float]]]:
    """Seconds before and after of each row that both have, in each round."""
    rows = [row for row in pair[0].rows if row in pair[1].rows]
    times: dict[Row, list[tuple[float, float]]] = {row: [] for row in rows}
    deadline = time.perf_counter() + seconds
    for number in range(rounds):
        for row in rows:
            first = number % 2
            one, two = pair[first].turn(row), pair[1 - first].turn(row)
            times[row].append((two, one) if first else (one, two))
        if time.perf_counter() > deadline and number + 1 >= LEAST_ROUNDS:
            break
    return times


def serve(checkout: Path, total: float | None) -> None:
    """Be the process of a checkout: print the rows, then run the row of each number that is read."""
    # Its benchmark and its package instead of this file's and of what is installed.
    sys.path[0] = str(checkout / "benchmarks")
    sys.path.insert(1, str(checkout))
    from common import gpt2_shapes
    from host_step import contenders

    import lightning_optim

    if not Path(lightning_optim.__file__).is_relative_to(checkout):
        raise SystemExit(f"{checkout} has no package lightning_optim")
    runs = [
        run
        for run in contenders(gpt2_shapes(total))
        if run.name.startswith("lightning-optim") or run.name == "torch fused"
    ]
    bursts = []
    for run in runs:
        for _ in range(3):  # build, create the state, touch the memory
            run.step()
        bursts.append(max(1, min(50, int(BURST_SECONDS / _seconds(run, 1)))))
    print(json.dumps([(run.job, run.name) for run in runs]), flush=True)
    for line in sys.stdin:
        index = int(line)
        runs[index].step()
        print(_seconds(runs[index], bursts[index]), flush=True)


def _seconds(run: Any, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        run.step()
    return (time.perf_counter() - start) / steps


if __name__ == "__main__":
    serve(Path(sys.argv[1]), json.loads(sys.argv[2]))
