"""The Triton engine's step against torch's and other packages', interleaved in one run on one GPU.

Each case is one question of the table below; its contenders take turns, round after round, so that a change of clock
or of temperature meets all of them, and what is reported for a pair is the median of the rounds' ratios. Device time is
between two CUDA events around a burst of steps; host time is what the Python thread spends on a step while the device
is still busy. The limit is the bandwidth of a copy of a gigabyte, measured in the same rounds.

    python benchmarks/gpu_step.py [--cases ...] [--weights 1000000000] [--rounds N]

Without a GPU the same code runs in Triton's interpreter, at a size at which that ends; its times mean nothing, and are
not written anywhere:

    TRITON_INTERPRET=1 python benchmarks/gpu_step.py --weights 2000 --rounds 1
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import gpt2_shapes
from gpu_report import machine, markdown
from torch import nn

import lightning_optim
from lightning_optim.engines.newton_schulz import orthogonalize
from lightning_optim.engines.scaling import LossScale
from lightning_optim.engines.triton.build import interpreted
from lightning_optim.optimizers import RuleOptimizer

RESULTS = Path(__file__).parent / "results"
OURS = "lightning-optim triton"
ADAMW: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}
MAX_NORM = 1.0
#: Timed steps of one turn take about this long on the device, at least one step.
BURST_SECONDS = 0.02


@dataclass
class Contender:
    """One way of doing a job.

    Attributes:
        name: For the table.
        step: Does it once.
        moved: Bytes of memory traffic that it cannot do without, or 0 if that is not the question.
    """

    name: str
    step: Callable[[], Any]
    moved: float = 0.0


@dataclass
class Case:
    """One question.

    Attributes:
        title: For the table.
        target: What the answer should be.
        contenders: The first is ours.
        facts: What was counted rather than timed.
    """

    title: str
    target: str
    contenders: list[Contender]
    facts: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Where and how large.

    Args:
        device: ``"cuda"``, or ``"cpu"`` for the interpreter.
        weights: Weights of the large cases.
    """

    def __init__(self, device: str, weights: int) -> None:
        self.device = torch.device(device)
        self.weights = weights

    def shapes(self, weights: float | None = None) -> list[tuple[int, ...]]:
        """GPT-2's 148 tensors, scaled; a few of them in the interpreter, which takes long for each."""
        found = gpt2_shapes(min(weights, self.weights) if weights else self.weights)
        return found[2:6] if interpreted() else found

    def parameters(self, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        """Weights with gradients: the same at every call."""
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(s, device=self.device).mul_(0.02).to(dtype)) for s in shapes]
        for p in params:
            p.grad = torch.randn(p.shape, device=self.device).mul_(1e-3).to(dtype)
        return params

    def wait(self) -> None:
        """For the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # -- the cases: see the table of targets in each title ---------------------------------------------------------

    def adamw(self) -> Case:
        """AdamW, float32."""
        shapes = self.shapes()
        n = sum(map(math.prod, shapes))
        runs = [
            Contender(OURS, self.ours("adamw", shapes, **ADAMW).step, 28.0 * n),
            Contender("torch fused", self.torch_adamw(shapes, fused=True).step, 28.0 * n),
            Contender("torch foreach", self.torch_adamw(shapes, foreach=True).step, 28.0 * n),
        ]
        return Case("AdamW float32", "≥ 0.90 of the copy bandwidth, ≥ 1.00× torch fused", runs)

    def clipped(self) -> Case:
        """With the global norm clipped."""
        shapes = self.shapes()
        n = sum(map(math.prod, shapes))
        fused = self.torch_adamw(shapes, fused=True)
        params = fused.param_groups[0]["params"]

        def theirs() -> None:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
            fused.step()

        ours = self.ours("adamw", shapes, max_grad_norm=MAX_NORM, **ADAMW)
        runs = [Contender(OURS, ours.step, 32.0 * n), Contender("clip_grad_norm_ + torch fused", theirs, 40.0 * n)]
        return Case("AdamW float32, global norm clipped", "≥ 1.20×", runs)

    def scaled(self) -> Case:
        """With a loss scale, unscaled and clipped."""
        shapes = self.shapes()
        n = sum(map(math.prod, shapes))
        ours, fused = self.ours("adamw", shapes, **ADAMW), self.torch_adamw(shapes, fused=True)
        params = fused.param_groups[0]["params"]
        scale, found = torch.tensor(1.0, device=self.device), torch.zeros((), device=self.device)
        scaler = torch.amp.GradScaler(self.device.type, init_scale=1.0, growth_interval=10**9)
        scaler.scale(torch.ones((), device=self.device))  # its lazy initialization

        def step() -> None:
            found.zero_()
            with torch.no_grad():
                ours._stepper.step(loss=LossScale(scale, found), max_grad_norm=MAX_NORM)

        def theirs() -> None:
            scaler.unscale_(fused)
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
            scaler.step(fused)
            scaler.update()

        runs = [
            Contender(OURS, step, 32.0 * n),
            Contender("GradScaler + clip_grad_norm_ + torch fused", theirs, 48.0 * n),
        ]
        return Case("AdamW float32, loss scale, global norm clipped", "≥ 1.40×", runs)

    def bfloat16(self) -> Case:
        """Weights and gradients in bfloat16, state in float32."""
        shapes = self.shapes()
        n = sum(map(math.prod, shapes))
        runs = [Contender(OURS, self.ours("adamw", shapes, torch.bfloat16, **ADAMW).step, 22.0 * n)]
        return Case("AdamW, bfloat16 weights and gradients, float32 state", "≥ 0.85 of the copy bandwidth", runs)

    def peers(self) -> Case:
        """GPT-2 124M against packages with Triton kernels of their own."""
        shapes = self.shapes(124e6)
        runs = [
            Contender(OURS, self.ours("adamw", shapes, **ADAMW).step),
            Contender("torch fused", self.torch_adamw(shapes, fused=True).step),
        ]
        for name, module, cls, options in (
            ("optimi", "optimi", "AdamW", {"triton": True}),
            ("FlashOptim", "flashoptim", "FlashAdamW", {}),
        ):
            with contextlib.suppress(ImportError, AttributeError, TypeError):
                made = getattr(importlib.import_module(module), cls)
                runs.append(Contender(name, made(self.parameters(shapes), **ADAMW, **options).step))
        return Case(f"AdamW float32, {len(shapes)} tensors of GPT-2", "≥ 1.6× optimi and FlashOptim", runs)

    def rules(self) -> Iterator[Case]:
        """Other rules against the same rules by torch's foreach kernels."""
        for name in ("lion", "lamb"):
            shapes = self.shapes(124e6)
            runs = [
                Contender(OURS, self.ours(name, shapes, lr=1e-4).step),
                Contender("the same rule, foreach", self.ours(name, shapes, engine="foreach", lr=1e-4).step),
            ]
            yield Case(f"{name}, float32, {len(shapes)} tensors", "≥ 2.5× foreach", runs)

    def host(self) -> Case:
        """300 small tensors: what the host does."""
        shapes: list[tuple[int, ...]] = [(8,)] * 8 if interpreted() else [(64,)] * 300
        ours = self.ours("adamw", shapes, max_grad_norm=MAX_NORM, **ADAMW)
        runs = [Contender(OURS, ours.step), Contender("torch fused", self.torch_adamw(shapes, fused=True).step)]
        return Case(f"{len(shapes)} tensors: host time", "≤ 0.15 ms, no waiting", runs, {"waits": self.waits(ours)})

    def stochastic(self) -> Case:
        """Stochastic rounding on and off."""
        shapes = self.shapes()
        runs = [
            Contender("stochastic", self.ours("adamw", shapes, torch.bfloat16, rounding="stochastic", **ADAMW).step),
            Contender("nearest", self.ours("adamw", shapes, torch.bfloat16, **ADAMW).step),
        ]
        return Case("AdamW bfloat16, rounding", "stochastic ≤ 1.05× the time of nearest", runs)

    def captured(self) -> Case:
        """The step as a CUDA graph, with new gradient tensors and a learning rate that moves."""
        shapes = self.shapes(124e6)
        graph, plain = (self.ours("adamw", shapes, max_grad_norm=MAX_NORM, **ADAMW) for _ in range(2))
        graph.capture_steps()
        for step in range(100 if self.device.type == "cuda" else 3):
            for optimizer in (graph, plain):
                group = optimizer.param_groups[0]
                group["lr"] = 1e-4 / (1 + step)
                for p, q in zip(group["params"], plain.param_groups[0]["params"], strict=True):
                    p.grad = torch.full_like(q, 1e-3 * (step + 1))
                optimizer.step()
        pairs = zip(graph.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True)
        spread = [float((p - q).detach().abs().max()) for p, q in pairs if p.numel()]
        runs = [Contender("captured", graph.step), Contender("launched one by one", plain.step)]
        return Case(f"CUDA graph, {len(shapes)} tensors", "bit-equal", runs, {"largest_difference": max(spread)})

    def newton_schulz(self) -> Case:
        """Muon's orthogonalization of one 4096 × 4096 matrix."""
        size = 4096 if self.weights >= 4096**2 else 32
        x = torch.randn(1, size, size, device=self.device)
        dtype = torch.float32 if interpreted() else torch.bfloat16
        runs = [
            Contender("symmetric products by Triton", lambda: orthogonalize(x, dtype=dtype, products="triton")),
            Contender("torch", lambda: orthogonalize(x, dtype=dtype, products="torch")),
        ]
        return Case(f"Newton–Schulz, {size} × {size}", "≥ 1.5× torch", runs)

    # -- contenders -------------------------------------------------------------------------------------------------

    def ours(self, name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        """One of our optimizers."""
        params = self.parameters(shapes, dtype)
        return lightning_optim.create_optimizer(name, params, **{"engine": "triton", **options})

    def torch_adamw(self, shapes: list[tuple[int, ...]], **how: Any) -> torch.optim.Optimizer:
        """Torch's own."""
        return torch.optim.AdamW(self.parameters(shapes), **ADAMW, **how)

    def waits(self, optimizer: RuleOptimizer) -> str:
        """Whether a step waits for the device: torch raises where it does."""
        for _ in range(2):
            optimizer.step()
        if self.device.type != "cuda":
            return "not looked for without a GPU"
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return "none"

    # -- measuring --------------------------------------------------------------------------------------------------

    def device_seconds(self, run: Contender, steps: int) -> float:
        """Of one step, on the device."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(steps):
                run.step()
            return (time.perf_counter() - start) / steps
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            run.step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / steps

    def host_seconds(self, run: Contender, steps: int = 20) -> float:
        """Of one step, on the host, which does not wait: the median, since a full queue would make it."""
        self.wait()
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            run.step()
            times.append(time.perf_counter() - start)
        self.wait()
        return statistics.median(times)

    def measure(self, case: Case, rounds: int) -> dict[str, Any]:
        """Let the contenders take turns."""
        source = torch.empty(2**28 if self.device.type == "cuda" else 2**10, device=self.device)
        target = torch.empty_like(source)
        copy = Contender("copy", lambda: target.copy_(source), 2.0 * source.nbytes)
        runs = [copy, *case.contenders]
        for run in runs:
            for _ in range(3):  # compile, create the state
                run.step()
        self.wait()
        bursts = [max(1, min(100, int(BURST_SECONDS / max(self.device_seconds(run, 1), 1e-6)))) for run in runs]
        times: list[list[float]] = [[] for _ in runs]
        for number in range(rounds):
            for k in range(len(runs)):
                index = (k + number) % len(runs)  # nobody always follows the same neighbour
                runs[index].step()
                times[index].append(self.device_seconds(runs[index], bursts[index]))
        bandwidth = copy.moved / statistics.median(times[0])
        rows = []
        for run, column in zip(case.contenders, times[1:], strict=True):
            ratio = statistics.median([b / a for a, b in zip(times[1], column, strict=True)])
            share = [run.moved / b / (copy.moved / a) for a, b in zip(times[0], column, strict=True)]
            rows.append(
                {
                    "name": run.name,
                    "device_ms": statistics.median(column) * 1e3,
                    "host_ms": self.host_seconds(run) * 1e3 if self.device.type == "cuda" else None,
                    "share_of_copy_bandwidth": statistics.median(share) if run.moved else None,
                    "ours_is_faster_by": ratio,
                }
            )
        return {
            "title": case.title,
            "target": case.target,
            "copy_bandwidth": bandwidth,
            "rounds": rounds,
            **case.facts,
            "rows": rows,
        }


CASES: dict[str, Callable[[Bench], Any]] = {
    "adamw": Bench.adamw,
    "clipped": Bench.clipped,
    "scaled": Bench.scaled,
    "bfloat16": Bench.bfloat16,
    "peers": Bench.peers,
    "rules": Bench.rules,
    "host": Bench.host,
    "stochastic": Bench.stochastic,
    "captured": Bench.captured,
    "newton_schulz": Bench.newton_schulz,
}


def main() -> None:
    """Measure, print, and on a GPU write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--weights", type=int, default=1_000_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if not interpreted() and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; for a trial without one: TRITON_INTERPRET=1 and a small --weights")
    bench = Bench("cpu" if interpreted() else "cuda", args.weights)
    result: dict[str, Any] = {"machine": machine(), "weights": args.weights, "cases": []}
    for name in args.cases:
        made = CASES[name](bench)
        for case in [made] if isinstance(made, Case) else made:
            result["cases"].append(bench.measure(case, args.rounds))
            print(json.dumps(result["cases"][-1]), flush=True)
            case.contenders.clear()
        del made, case
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    print(markdown(result))
    if bench.device.type == "cuda":
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "gpu_step.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "gpu_step.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
