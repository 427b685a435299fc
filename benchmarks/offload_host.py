"""The host's pass of an offloaded step: bfloat16 gradient → float32 master and state → bfloat16 weight.

Three groups, each interleaved in one run, so that the memory of a laptop is enough at 124M weights: ours against others
at AdamW; our other rules and float64 masters; and what a step costs that can be taken back.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Contender, Mixed, deepspeed_adam, gpt2_shapes, machine, measure, stream

import lightning_optim

OURS = "lightning-optim, one pass"
DEEPSPEED = "DeepSpeedCPUAdam + casts"
DEEPSPEED_FLAT = "DeepSpeedCPUAdam + casts, one flat tensor"
KEPT = "torch fused + casts, buffers kept"
FRESH = "torch fused + casts, grad.float()"
FOREACH = "torch foreach + casts, buffers kept"
F64, LION, SGD = "AdamW, float64 masters", "Lion", "SGD with momentum"
UNDO, SNAPSHOT = "one pass that keeps what it overwrites", "snapshot, then one pass"

#: Bytes of memory traffic per weight that each job cannot do without. (A kernel that wrote a second copy of what it
#: overwrites: 12 more; a snapshot reads and writes them: 24.)
BYTES = {"adamw": 28, F64: 52, LION: 20, SGD: 20, UNDO: 40, SNAPSHOT: 52}

#: Nanoseconds per weight at 124M weights, said before the first run: the design's figures of another machine (two
#: cores, 37 GB/s), where it has some.
PREDICTED = {
    OURS: 0.78,
    DEEPSPEED: 1.61,
    DEEPSPEED_FLAT: 1.60,
    KEPT: 1.58,
    FRESH: 2.00,
    FOREACH: 4.29,
    F64: 1.61,
    LION: 0.60,
    SGD: 0.60,
    UNDO: 1.20,
    SNAPSHOT: 1.90,
}

ADAMW: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
_ours_adamw = partial(lightning_optim.AdamW, engine="host", **ADAMW)

Shapes = list[tuple[int, ...]]


def peers(shapes: Shapes) -> list[Contender]:
    """AdamW by whatever is installed."""
    mixed = Mixed(shapes)
    found = [Contender(OURS, "adamw", mixed.ours(_ours_adamw))]
    if (deepspeed := deepspeed_adam()) is not None:
        adam = partial(deepspeed, **ADAMW)
        found.append(Contender(DEEPSPEED, "adamw", mixed.with_casts(adam)))
        flat = Mixed([(sum(map(math.prod, shapes)),)])
        found.append(Contender(DEEPSPEED_FLAT, "adamw", flat.with_casts(adam)))
    fused = partial(torch.optim.AdamW, fused=True, **ADAMW)
    found += [
        Contender(KEPT, "adamw", mixed.with_casts(fused)),
        Contender(FRESH, "adamw", mixed.with_casts(fused, fresh=True)),
        Contender(FOREACH, "adamw", mixed.with_casts(partial(torch.optim.AdamW, foreach=True, **ADAMW))),
    ]
    return found


def rules(shapes: Shapes) -> list[Contender]:
    """Other rules of ours, and masters of twice the bits."""
    mixed = Mixed(shapes)
    return [
        Contender(OURS, "adamw", mixed.ours(_ours_adamw)),
        Contender(LION, LION, mixed.ours(partial(lightning_optim.Lion, engine="host"))),
        Contender(SGD, SGD, mixed.ours(partial(lightning_optim.SGD, lr=1e-4, momentum=0.9, engine="host"))),
        Contender(F64, F64, Mixed(shapes, torch.float64).ours(_ours_adamw)),
    ]


def undo(shapes: Shapes) -> list[Contender]:
    """Steps that can be taken back, bit for bit."""
    mixed = Mixed(shapes)
    plain = mixed.ours(_ours_adamw)
    return [
        Contender(OURS, "adamw", plain),
        Contender(UNDO, UNDO, mixed.ours(_ours_adamw, undo=True)),
        Contender(SNAPSHOT, SNAPSHOT, mixed.snapshot_first(plain)),
    ]


GROUPS: dict[str, Callable[[Shapes], list[Contender]]] = {"peers": peers, "rules": rules, "undo": undo}


def torchao() -> str:
    """What became of torchao's ``CPUOffloadOptimizer``, in words."""
    try:
        from torchao.optim import CPUOffloadOptimizer
    except ImportError:
        return "not installed"
    try:
        CPUOffloadOptimizer([torch.nn.Parameter(torch.zeros(64, 64))])
    except (AssertionError, RuntimeError) as error:
        return f"does not run here: {error}"
    return "runs: see the part on a GPU"


def summarize(runs: list[Contender], times: list[list[float]], weights: int, full: bool) -> list[dict[str, Any]]:
    """One row for each contender, the first of which is the limit and the second ours."""
    limit, ours = times[0], times[1]
    rows = []
    for run, column in zip(runs[1:], times[1:], strict=True):
        share = [BYTES[run.job] / BYTES["adamw"] * a / b for a, b in zip(limit, column, strict=True)]
        rows.append(
            {
                "name": run.name,
                "ns_per_weight": statistics.median(column) / weights * 1e9,
                "predicted_ns_per_weight": PREDICTED[run.name] if full else None,
                "share_of_limit": statistics.median(share),
                "times_ours": statistics.median([b / a for a, b in zip(ours, column, strict=True)]),
                "rounds": len(column),
            }
        )
    return rows


def run(sizes: dict[str, float | None], rounds: int, seconds: float) -> dict[str, Any]:
    """Measure.

    Args:
        sizes: By label, weights; None: all of GPT-2.
        rounds: At most so many for each group.
        seconds: About how long each group may take.
    """
    cases = []
    for label, total in sizes.items():
        shapes = gpt2_shapes(total)
        weights = sum(map(math.prod, shapes))
        for group, make in GROUPS.items():
            runs = [Contender("in-place stream, 4 reads 3 writes", "adamw", stream(shapes)), *make(shapes)]
            times = measure(runs, rounds, seconds, least=5)
            bandwidth = BYTES["adamw"] * weights / statistics.median(times[0])
            rows = summarize(runs, times, weights, total is None)
            case = {"label": label, "weights": weights, "tensors": len(shapes), "group": group}
            cases.append({**case, "limit_bytes_per_second": bandwidth, "rows": rows})
            for row in rows:
                print(
                    f"{label:>5} {row['name']:45} {row['ns_per_weight']:8.3f} ns {row['times_ours']:6.2f}×", flush=True
                )
            del runs
            gc.collect()
    about = {**machine(), "deepspeed": _version("deepspeed"), "torchao": torchao()}
    return {"machine": about, "cases": cases}


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
