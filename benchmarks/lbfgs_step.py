"""L-BFGS's time per iteration against torch.optim.LBFGS, with a full history, interleaved in one run.

The loss is a quadratic whose gradient is one product, so that next to nothing of the time is the model's. torch fills
its history by iterating; ours takes over its pairs and weights. Then each has its turn, round after round; what is
reported for the pair is the median of the rounds' ratios. The limit is the time in which this machine reads the history
twice, as the compact form must, measured in the same rounds by torch's sum over one of its halves.

    python benchmarks/lbfgs_step.py [--weights N] [--history K] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine
from torch import Tensor

import lightning_optim

#: Condition of the quadratic: neither comes near the end while it is measured.
CONDITION = 1e4

OURS, TORCH, LIMIT = "lightning-optim LBFGS", "torch.optim.LBFGS", "reading the history twice"


class Contender:
    """One optimizer with a problem of its own.

    Args:
        weights: Size of the problem.
        make: Makes the optimizer.
    """

    def __init__(self, weights: int, make: Callable[[Tensor], torch.optim.Optimizer]) -> None:
        self.weight = torch.nn.Parameter(torch.randn(weights, generator=torch.Generator().manual_seed(0)))
        self.hessian = torch.logspace(0, float(torch.tensor(CONDITION).log10()), weights)
        self.weight.grad = self.gradient = torch.zeros(weights)
        self.optimizer = make(self.weight)
        self.evaluations = 0

    @torch.no_grad()
    def closure(self) -> Tensor:
        """The loss, with its gradient."""
        self.evaluations += 1
        torch.mul(self.hessian, self.weight, out=self.weight.grad)
        return torch.dot(self.weight, self.gradient) / 2

    def iterations(self) -> int:
        """How many there were so far."""
        if isinstance(self.optimizer, lightning_optim.LBFGS):
            return self.optimizer.counts["iterations"]
        return int(self.optimizer.state[self.weight].get("n_iter", 0))

    def iterate(self) -> None:
        """One step."""
        self.optimizer.step(self.closure)  # type: ignore[arg-type] # torch's own takes such closures, and types none

    def turn(self) -> tuple[float, float]:
        """One step: seconds and evaluations per iteration."""
        iterations, evaluations = self.iterations(), self.evaluations
        start = time.perf_counter()
        self.iterate()
        seconds = time.perf_counter() - start
        done = self.iterations() - iterations
        return seconds / done, (self.evaluations - evaluations) / done


def contenders(weights: int, history: int, per_step: int) -> dict[str, Contender]:
    """Both, with a full history of the same pairs."""
    common: dict[str, Any] = {"history_size": history, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    common |= {"max_iter": per_step, "max_eval": 25 * per_step}
    theirs = Contender(weights, lambda p: torch.optim.LBFGS([p], line_search_fn="strong_wolfe", **common))
    ours = Contender(weights, lambda p: lightning_optim.LBFGS([p], line_search="strong_wolfe", **common))
    while theirs.iterations() <= history:
        theirs.iterate()
    ours.optimizer.load_state_dict(theirs.optimizer.state_dict())
    ours.weight.data.copy_(theirs.weight.data)
    return {OURS: ours, TORCH: theirs}


def measure(weights: int, history: int, per_step: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each contender, and one for the limit."""
    runs = contenders(weights, history, per_step)
    half = torch.ones(history, weights)
    for run in runs.values():
        run.turn()
    seconds: dict[str, list[float]] = {name: [] for name in (*runs, LIMIT)}
    evaluations: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken, evaluated = run.turn()
            seconds[name].append(taken)
            evaluations[name].append(evaluated)
        start = time.perf_counter()
        half.sum()
        seconds[LIMIT].append(4 * (time.perf_counter() - start))
    rows = []
    for name, column in seconds.items():
        ratios = [b / a for a, b in zip(seconds[OURS], column, strict=True)]
        rows.append(
            {
                "name": name,
                "weights": weights,
                "history": history,
                "iterations_per_step": per_step,
                "milliseconds_per_iteration": statistics.median(column) * 1e3,
                "evaluations_per_iteration": statistics.median(evaluations[name]) if name in evaluations else None,
                "ours_is_faster_by": statistics.median(ratios),
                "rounds": rounds,
            }
        )
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    about = result["machine"]
    lines = [
        f"{about['cpu']}, {about['threads']} threads, {about['simd']}; torch {about['torch']}; {about['date']}. "
        "`python benchmarks/lbfgs_step.py`",
        "",
        "| weights, float32 | pairs | iterations a step | | ms per iteration | evaluations | ours is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        evaluations = row["evaluations_per_iteration"]
        lines.append(
            f"| {row['weights'] / 1e6:g}M | {row['history']} | {row['iterations_per_step']} | {row['name']} "
            f"| {row['milliseconds_per_iteration']:.1f} | {'' if evaluations is None else f'{evaluations:.1f}'} "
            f"| {'' if row['name'] == OURS else format(row['ours_is_faster_by'], '.2f') + '×'} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, print, and write ``results/lbfgs_step.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=2_000_000)
    parser.add_argument("--history", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the Markdown")
    arguments = parser.parse_args()
    rows = []
    # One iteration a step is our default, and takes two evaluations; many share the evaluations between them.
    for per_step in (1, 5):
        rows += measure(arguments.weights, arguments.history, per_step, arguments.rounds)
    result = {"machine": machine(), "rows": rows}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "lbfgs_step.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "lbfgs_step.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
