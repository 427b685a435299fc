"""The host engine's step against torch's and DeepSpeed's, interleaved in one run.

Every contender has its turn, round after round, so that a change of the machine's speed meets all of them; what is
reported for a pair is the median of the rounds' ratios. A turn is one untimed step and then a burst of timed ones, of
about ten milliseconds in all, so that a small model is measured with its own data in the cache and not with its
neighbour's. The limit is the time of an in-place stream with AdamW's traffic (four reads and three writes) over the
same tensors, measured in the same rounds.

    python benchmarks/host_step.py [--sizes 1M 10M 124M] [--rounds N] [--seconds S]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lightning_optim
from lightning_optim.engines.base import Bucket, Layout
from lightning_optim.engines.host.engine import HostEngine
from lightning_optim.engines.host.threads import thread_count
from lightning_optim.engines.host.toolchain import find_toolchain
from lightning_optim.optimizers.plan import Options
from lightning_optim.optimizers.stepper import Stepper
from lightning_optim.rules import Policy, Rule, Update

RESULTS = Path(__file__).parent / "results"
SIZES = {"1M": 1e6, "10M": 1e7, "124M": None}

_KEPT, _FRESH = "torch fused + casts, buffers kept", "torch fused + casts, grad.float()"

#: How long the timed steps of one turn take, at least one step.
BURST_SECONDS = 0.01

#: Bytes of memory traffic per weight that each job cannot do without.
BYTES = {"limit": 28, "adamw": 28, "lion": 20, "adamw mixed": 28}


def gpt2_shapes(total: float | None) -> list[tuple[int, ...]]:
    """The 148 tensors of GPT-2 (124M), every dimension scaled to reach about ``total`` weights."""
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    shapes: list[tuple[int, ...]] = [(50257, d), (1024, d), *block * 12, (d,), (d,)]
    if total is None:
        return shapes
    factor = math.sqrt(total / sum(math.prod(s) for s in shapes))
    return [tuple(max(1, int(n * factor)) for n in s) for s in shapes]


@dataclass
class Contender:
    """One way of doing a job.

    Attributes:
        name: For the table.
        job: ``"adamw"``, ``"lion"`` or ``"adamw mixed"``: what it is compared within.
        step: Does it once.
    """

    name: str
    job: str
    step: Callable[[], Any]


def _parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).mul_(0.02).to(dtype)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).mul_(1e-3).to(dtype)
    return params


def stream(shapes: list[tuple[int, ...]]) -> Callable[[], None]:
    """AdamW's memory traffic without its arithmetic: three arrays are read, added to and written; one is read."""

    def add(p: Any, g: Any, exp_avg: Any, exp_avg_sq: Any, *, lr: Any) -> Any:
        return lr * g, exp_avg + g, exp_avg_sq + g

    params = _parameters(shapes)
    update = Update(Rule(add), Policy())
    names = ("p", "g", "exp_avg", "exp_avg_sq")
    bucket = Bucket(
        update=update,
        layout=Layout(torch.float32, tuple((name, torch.float32) for name in names)),
        device=torch.device("cpu"),
        tensors={
            "p": [p.detach() for p in params],
            "g": [p.grad for p in params if p.grad is not None],
            "exp_avg": [torch.zeros_like(p) for p in params],
            "exp_avg_sq": [torch.zeros_like(p) for p in params],
        },
        steps=None,
        rows=array("i", [0] * len(params)),
        ids=array("i", range(len(params))),
        sizes=tuple(p.numel() for p in params),
    )
    engine = HostEngine()
    if (reason := engine.rejects(bucket)) is not None:
        raise SystemExit(f"the host engine is not available here: {reason}")
    bucket.locate()
    return lambda: engine.run(bucket, [{"lr": 1e-6}])


class Mixed:
    """bfloat16 gradient → float32 master and moments → bfloat16 weight."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        self.masters = _parameters(shapes)
        self.grads: dict[Tensor, Tensor] = {}
        self.weights: dict[Tensor, Tensor] = {}
        for master in self.masters:
            assert master.grad is not None
            self.grads[master] = master.grad.to(torch.bfloat16)
            self.weights[master] = master.detach().to(torch.bfloat16)
            master.grad = None

    def ours(self) -> Callable[[], None]:
        """One pass of the host engine."""
        optimizer = lightning_optim.AdamW(self.masters, lr=1e-4, engine="host")
        stepper = Stepper(optimizer, type(optimizer), Options(engine="host"))

        def step(keep: Any = optimizer) -> None:  # the stepper does not own its optimizer
            with torch.no_grad():
                stepper.step(self.grads, self.weights)

        return step

    def with_casts(self, optimizer: torch.optim.Optimizer, *, fresh: bool = False) -> Callable[[], None]:
        """Any float32 optimizer between a cast of the gradients and one of the weights.

        Args:
            optimizer: Of the masters.
            fresh: Cast to new gradients, as ``grad.float()`` in a training loop does; otherwise to buffers that are
                kept, the best that can be made of it.
        """
        if fresh:

            def loop() -> None:
                for master in self.masters:
                    master.grad = self.grads[master].float()
                optimizer.step()
                optimizer.zero_grad()
                for master in self.masters:
                    self.weights[master].copy_(master.detach())

            return loop
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        buffers = [master.grad for master in self.masters if master.grad is not None]
        grads, weights = list(self.grads.values()), list(self.weights.values())
        masters = [master.detach() for master in self.masters]

        def step() -> None:
            torch._foreach_copy_(buffers, grads)
            optimizer.step()
            torch._foreach_copy_(weights, masters)

        return step


def contenders(shapes: list[tuple[int, ...]]) -> list[Contender]:
    """All that is installed here."""
    adamw: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
    found = [
        Contender("in-place stream, 4 reads 3 writes", "limit", stream(shapes)),
        Contender(
            "lightning-optim host", "adamw", lightning_optim.AdamW(_parameters(shapes), engine="host", **adamw).step
        ),
        Contender("torch fused", "adamw", torch.optim.AdamW(_parameters(shapes), fused=True, **adamw).step),
        Contender("torch foreach", "adamw", torch.optim.AdamW(_parameters(shapes), foreach=True, **adamw).step),
        Contender("lightning-optim host", "lion", lightning_optim.Lion(_parameters(shapes), engine="host").step),
        Contender("lightning-optim host", "adamw mixed", Mixed(shapes).ours()),
    ]
    for name, fresh in ((_KEPT, False), (_FRESH, True)):
        mixed = Mixed(shapes)
        fused = torch.optim.AdamW(mixed.masters, fused=True, **adamw)
        found.append(Contender(name, "adamw mixed", mixed.with_casts(fused, fresh=fresh)))
    if (deepspeed := _deepspeed_adam()) is not None:
        found.append(Contender("DeepSpeedCPUAdam", "adamw", deepspeed(_parameters(shapes), **adamw).step))
        mixed = Mixed(shapes)
        found.append(
            Contender("DeepSpeedCPUAdam + casts", "adamw mixed", mixed.with_casts(deepspeed(mixed.masters, **adamw)))
        )
    return found


def _deepspeed_adam() -> Callable[..., torch.optim.Optimizer] | None:
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError:
        return None
    return lambda params, **options: DeepSpeedCPUAdam(params, adamw_mode=True, **options)


def measure(runs: list[Contender], rounds: int, seconds: float) -> list[list[float]]:
    """Seconds of a step of each contender in each round."""
    for run in runs:
        for _ in range(3):  # build, create the state, touch the memory
            run.step()
    times: list[list[float]] = [[] for _ in runs]
    bursts = [max(1, min(50, int(BURST_SECONDS / _seconds(run, 1)))) for run in runs]
    deadline = time.perf_counter() + seconds
    for number in range(rounds):
        for k in range(len(runs)):
            index = (k + number) % len(runs)  # nobody always follows the same neighbour
            runs[index].step()
            times[index].append(_seconds(runs[index], bursts[index]))
        if time.perf_counter() > deadline and number >= 8:
            break
    return times


def _seconds(run: Contender, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        run.step()
    return (time.perf_counter() - start) / steps


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags")).split()
        simd = next((s for s in ("avx512f", "avx2", "avx") if s in flags), "none")
    except (OSError, StopIteration):
        simd = "unknown"
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "simd": simd,
        "threads": thread_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning_optim": lightning_optim.__version__,
        "compiler": find_toolchain().version,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def build_seconds() -> dict[str, float]:
    """The first step of each rule with an empty kernel cache, in seconds: tracing, printing, compiling, loading."""
    import subprocess
    import sys
    import tempfile

    code = (
        "import sys, time, torch, lightning_optim as lo\n"
        "weight = torch.nn.Parameter(torch.ones(4, 4)); weight.grad = torch.ones(4, 4)\n"
        "optimizer = lo.create_optimizer(sys.argv[1], [weight], engine='host')\n"
        "start = time.perf_counter()\n"
        "optimizer.step()\n"
        "print(time.perf_counter() - start)\n"
    )
    seconds = {}
    for name in lightning_optim.list_optimizers():
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "LIGHTNING_OPTIM_CACHE": folder}
            shown = subprocess.run(
                [sys.executable, "-c", code, name], env=env, capture_output=True, text=True, check=True
            )
        seconds[name] = float(shown.stdout)
    return seconds


def summarize(runs: list[Contender], times: list[list[float]], weights: int) -> list[dict[str, Any]]:
    """One row for each contender: time, share of the limit, and how much faster ours is at the same job."""
    ours = {run.job: column for run, column in zip(runs, times, strict=True) if run.name.startswith("lightning-optim")}
    limit = next(column for run, column in zip(runs, times, strict=True) if run.job == "limit")
    rows = []
    for run, column in zip(runs, times, strict=True):
        share = [BYTES[run.job] / BYTES["limit"] * a / b for a, b in zip(limit, column, strict=True)]
        ratio = [b / a for a, b in zip(ours[run.job], column, strict=True)] if run.job in ours else []
        rows.append(
            {
                "job": run.job,
                "name": run.name,
                "ns_per_weight": statistics.median(column) / weights * 1e9,
                "share_of_limit": statistics.median(share),
                "ours_is_faster_by": statistics.median(ratio) if ratio else None,
                "rounds": len(column),
            }
        )
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The tables for the README."""
    about = result["machine"]
    lines = [
        f"{about['cpu']}, {about['threads']} threads, {about['simd']}; torch {about['torch']}, {about['compiler']}; "
        f"{about['date']}. `python benchmarks/host_step.py`",
        "",
        "| job | weights | step | ns per weight | share of the limit | ours is faster by |",
        "|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        for row in case["rows"]:
            faster = row["ours_is_faster_by"]
            shown = "" if faster is None or row["name"].startswith("lightning-optim") else f"{faster:.2f}×"
            lines.append(
                f"| {row['job']} | {case['label']} | {row['name']} | {row['ns_per_weight']:.3f} "
                f"| {row['share_of_limit']:.0%} | {shown} |"
            )
    builds = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result["build_seconds"].items())
    return "\n".join([*lines, "", f"First step with an empty kernel cache: {builds}.", ""])


def summary(result: dict[str, Any]) -> str:
    """The table for the README: one column for each size, in the tensors of GPT-2; all rows are in the results."""
    cases = [case for case in result["cases"] if case["tensors"] > 1]
    about = result["machine"]

    def row(title: str, job: str, name: str, field: str, form: str) -> str:
        cells = []
        for case in cases:
            found = [r for r in case["rows"] if (r["job"], r["name"]) == (job, name)]
            cells.append(format(found[0][field], form) + ("×" if "ours" in field else "") if found else "")
        return f"| {title} | {' | '.join(cells)} |"

    ours, faster, share = "lightning-optim host", "ours_is_faster_by", "share_of_limit"
    lines = [
        f"| weights, in {cases[0]['tensors']} tensors | {' | '.join(case['label'].split()[0] for case in cases)} |",
        "|---|" + "---|" * len(cases),
        row("AdamW float32, against torch fused", "adamw", "torch fused", faster, ".2f"),
        row("AdamW float32, against torch foreach", "adamw", "torch foreach", faster, ".2f"),
        row("AdamW float32, share of the limit", "adamw", ours, share, ".0%"),
        row("Lion float32, share of the limit", "lion", ours, share, ".0%"),
        row("mixed, against torch fused and `grad.float()`", "adamw mixed", _FRESH, faster, ".2f"),
        row("mixed, against torch fused and casts to kept buffers", "adamw mixed", _KEPT, faster, ".2f"),
        row("mixed, share of the limit", "adamw mixed", ours, share, ".0%"),
        "",
        f"{about['cpu']}, {about['threads']} threads, {about['simd']}, torch {about['torch']}, {about['date']}; "
        "`python benchmarks/host_step.py`, all rows in `benchmarks/results/`. At 1M all data is in the cache, and the "
        "rest of the time is Python's.",
    ]
    return "\n".join(lines) + "\n"


def run_case(shapes: list[tuple[int, ...]], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Measure all contenders on tensors of these shapes; their memory (17 GB at 124M) is free again on return."""
    runs = contenders(shapes)
    return summarize(runs, measure(runs, rounds, seconds), sum(math.prod(s) for s in shapes))


def update_readme(table: str) -> None:
    """Put the table between the README's markers."""
    readme = Path(__file__).parent.parent / "README.md"
    before, begin, rest = readme.read_text().partition("<!-- host_step: generated by benchmarks/host_step.py -->\n")
    _, end, after = rest.partition("<!-- /host_step -->")
    readme.write_text(f"{before}{begin}{table}{end}{after}")


def main() -> None:
    """Measure, print, and write ``results/host_step.{json,md}``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=400, help="at most so many rounds for each case")
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long each case may take")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the Markdown")
    parser.add_argument("--readme", action="store_true", help="also put the table into the README")
    arguments = parser.parse_args()
    cases = []
    for label in arguments.sizes:
        shapes = gpt2_shapes(SIZES[label])
        weights = sum(math.prod(s) for s in shapes)
        for these in (shapes, list[tuple[int, ...]]([(weights,)])):
            rows = run_case(these, arguments.rounds, arguments.seconds)
            case = {"label": f"{label} in {len(these)}", "weights": weights, "tensors": len(these), "rows": rows}
            cases.append(case)
            for row in rows:
                print(
                    case["label"], {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True
                )
    result = {"machine": machine(), "build_seconds": build_seconds(), "cases": cases}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "host_step.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "host_step.md").write_text(markdown(result))
    print(markdown(result))
    if arguments.readme:
        update_readme(summary(result))


if __name__ == "__main__":
    main()
