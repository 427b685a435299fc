"""The host engine's step against torch's and DeepSpeed's, interleaved in one run.

Every contender has its turn, round after round, so that a change of the machine's speed meets all of them; what is
reported for a pair is the median of the rounds' ratios. A turn is one untimed step and then a burst of timed ones, of
about ten milliseconds in all, so that a small model is measured with its own data in the cache and not with its
neighbour's. The limit is the time of an in-place stream with AdamW's traffic (four reads and three writes) over the
same tensors, measured in the same rounds.

    python benchmarks/host_step.py [--sizes 1M 10M 124M] [--rounds N] [--seconds S]
    python benchmarks/host_step.py --against ../other-checkout     # before and after, in one run
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import against
import torch
from common import (
    RESULTS,
    Contender,
    Mixed,
    deepspeed_adam,
    gpt2_shapes,
    machine,
    measure,
    parameters,
    put_between,
    size,
    stream,
    weights,
)

import lightning_optim
from lightning_optim.registry import OPTIMIZERS

_KEPT, _FRESH = "torch fused + casts, buffers kept", "torch fused + casts, grad.float()"

#: Bytes of memory traffic per weight that each job cannot do without.
BYTES = {"limit": 28, "adamw": 28, "lion": 20, "adamw mixed": 28}


def contenders(shapes: list[tuple[int, ...]]) -> list[Contender]:
    """All that is installed here."""
    adamw: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
    found = [
        Contender("in-place stream, 4 reads 3 writes", "limit", stream(shapes)),
        Contender(
            "lightning-optim host", "adamw", lightning_optim.AdamW(parameters(shapes), engine="host", **adamw).step
        ),
        Contender("torch fused", "adamw", torch.optim.AdamW(parameters(shapes), fused=True, **adamw).step),
        Contender("torch foreach", "adamw", torch.optim.AdamW(parameters(shapes), foreach=True, **adamw).step),
        Contender("lightning-optim host", "lion", lightning_optim.Lion(parameters(shapes), engine="host").step),
        Contender(
            "lightning-optim host",
            "adamw mixed",
            Mixed(shapes).ours(partial(lightning_optim.AdamW, engine="host", lr=1e-4)),
        ),
    ]
    for name, fresh in ((_KEPT, False), (_FRESH, True)):
        fused = partial(torch.optim.AdamW, fused=True, **adamw)
        found.append(Contender(name, "adamw mixed", Mixed(shapes).with_casts(fused, fresh=fresh)))
    if (deepspeed := deepspeed_adam()) is not None:
        found.append(Contender("DeepSpeedCPUAdam", "adamw", deepspeed(parameters(shapes), **adamw).step))
        step = Mixed(shapes).with_casts(partial(deepspeed, **adamw))
        found.append(Contender("DeepSpeedCPUAdam + casts", "adamw mixed", step))
    return found


def build_seconds(rules: Sequence[str]) -> dict[str, float]:
    """The first step of each rule with an empty kernel cache, in seconds: tracing, printing, compiling, loading."""
    code = (
        "import sys, time, torch, lightning_optim as lo\n"
        "weight = torch.nn.Parameter(torch.ones(4, 4)); weight.grad = torch.ones(4, 4)\n"
        "optimizer = lo.create_optimizer(sys.argv[1], [('weight', weight)], engine='host')\n"
        "start = time.perf_counter()\n"
        "optimizer.step()\n"
        "print(time.perf_counter() - start)\n"
    )
    seconds = {}
    for name in rules:
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "LIGHTNING_OPTIM_CACHE": folder}
            shown = subprocess.run([sys.executable, "-c", code, name], env=env, stdout=subprocess.PIPE, check=True)
        seconds[name] = float(shown.stdout)
    return seconds


def summarize(runs: list[Contender], times: list[list[float]], count: int) -> list[dict[str, Any]]:
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
                "ns_per_weight": statistics.median(column) / count * 1e9,
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


def main() -> None:
    """Measure, print, and write ``results/host_step.{json,md}``; against another checkout, print only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=size, default=["1M", "10M", "124M"])
    parser.add_argument("--rounds", type=int, default=400, help="at most so many rounds for each case")
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long each case may take")
    parser.add_argument("--rules", nargs="*", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="whose build is timed")
    parser.add_argument("--against", type=Path, help="another checkout of this repository, to take turns with")
    parser.add_argument("--starts", type=int, default=3, help="pairs of processes for each size, with --against")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON and the Markdown")
    parser.add_argument("--readme", action="store_true", help="also put the table into the README")
    arguments = parser.parse_args()
    if arguments.against is not None:
        ours = Path(__file__).parent.parent
        limits = {"rounds": arguments.rounds, "seconds": arguments.seconds, "starts": arguments.starts}
        print(against.report(ours, arguments.against, arguments.sizes, **limits))
        return
    cases = []
    for label in arguments.sizes:
        shapes = gpt2_shapes(weights(label))
        count = sum(math.prod(s) for s in shapes)
        for these in (shapes, list[tuple[int, ...]]([(count,)])):
            rows = run_case(these, arguments.rounds, arguments.seconds)
            case = {"label": f"{label} in {len(these)}", "weights": count, "tensors": len(these), "rows": rows}
            cases.append(case)
            for row in rows:
                print(
                    case["label"], {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True
                )
    result = {"machine": machine(), "build_seconds": build_seconds(arguments.rules), "cases": cases}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "host_step.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "host_step.md").write_text(markdown(result))
    print(markdown(result))
    if arguments.readme:
        put_between(Path(__file__).parent.parent / "README.md", "host_step", summary(result))


if __name__ == "__main__":
    main()
