"""What the benchmarks share: GPT-2's shapes, turns in one run, casts around other optimizers, the machine."""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from array import array
from collections.abc import Callable, Sequence
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
from lightning_optim.rules import Policy, Rule, Update
from lightning_optim.stepping.method import Options
from lightning_optim.stepping.stepper import Stepper
from lightning_optim.stepping.undo import UndoBuffers

RESULTS = Path(__file__).parent / "results"

#: How long the timed steps of one turn take, at least one step.
BURST_SECONDS = 0.01

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def gpt2_shapes(total: float | None) -> list[tuple[int, ...]]:
    """The 148 tensors of GPT-2 (124M), every dimension scaled to reach about ``total`` weights."""
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    shapes: list[tuple[int, ...]] = [(50257, d), (1024, d), *block * 12, (d,), (d,)]
    if total is None:
        return shapes
    factor = math.sqrt(total / sum(math.prod(s) for s in shapes))
    return [tuple(max(1, int(n * factor)) for n in s) for s in shapes]


def weights(label: str) -> float | None:
    """Of ``"10M"``, 1e7; of ``"124M"``, None: GPT-2 as it is.

    Raises:
        argparse.ArgumentTypeError: It is no such number.
    """
    if label == "124M":
        return None
    try:
        found = float(label[:-1]) * {"k": 1e3, "M": 1e6}[label[-1]]
    except (ValueError, KeyError, IndexError):
        found = 0.0
    if found <= 0:
        raise argparse.ArgumentTypeError(f"{label!r}; valid: a number with k or M, such as 10M")
    return found


def size(label: str) -> str:
    """The label of a number of weights, checked."""
    weights(label)
    return label


@dataclass
class Contender:
    """One way of doing a job.

    Attributes:
        name: For the table.
        job: What it is compared within.
        step: Does it once.
    """

    name: str
    job: str
    step: Callable[[], Any]


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Weights with gradients: the same at every call."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).mul_(0.02).to(dtype)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).mul_(1e-3).to(dtype)
    return params


def stream(shapes: list[tuple[int, ...]]) -> Callable[[], None]:
    """AdamW's memory traffic without its arithmetic: three arrays are read, added to and written; one is read."""

    def add(p: Any, g: Any, exp_avg: Any, exp_avg_sq: Any, *, lr: Any) -> Any:
        return lr * g, exp_avg + g, exp_avg_sq + g

    params = parameters(shapes)
    update = Update(Rule(add), Policy())
    names = ("p", "g", "exp_avg", "exp_avg_sq")
    tensors = {
        "p": [p.detach() for p in params],
        "g": [p.grad for p in params if p.grad is not None],
        "exp_avg": [torch.zeros_like(p) for p in params],
        "exp_avg_sq": [torch.zeros_like(p) for p in params],
    }
    # By place, not by name: a checkout to compare with may have other names for the numbers of the param groups.
    bucket = Bucket(
        update,
        Layout(torch.float32, tuple((name, torch.float32) for name in names)),
        torch.device("cpu"),
        tensors,
        None,
        array("i", [0] * len(params)),
        array("i", range(len(params))),
        tuple(p.numel() for p in params),
    )
    engine = HostEngine()
    if (reason := engine.rejects(bucket)) is not None:
        raise SystemExit(f"the host engine is not available here: {reason}")
    bucket.locate()
    return lambda: engine.run(bucket, [{"lr": 1e-6}])


class Mixed:
    """bfloat16 gradient → master and state → bfloat16 weight.

    Several contenders may share one of these, memory being short: each has parameters of its own over the same masters,
    and slots of the same name are one.

    Args:
        shapes: Of the weights.
        dtype: Of the masters.
    """

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        made = parameters(shapes, dtype)
        self.masters = [p.detach() for p in made]
        self.grads = [p.grad.to(torch.bfloat16) for p in made if p.grad is not None]
        self.weights = [p.to(torch.bfloat16) for p in self.masters]
        self._casts: list[Tensor] | None = None
        self._slots: dict[str, list[Tensor]] = {}

    def ours(self, make: Make, *, undo: bool = False) -> Callable[[], None]:
        """One pass of the host engine, as detached steps do it.

        Args:
            make: One of our optimizers.
            undo: Keep what the step overwrites, so that it can be taken back.
        """
        params = self._parameters()
        optimizer = make(params)
        stepper = Stepper(optimizer, type(optimizer), Options(engine="host"))  # type: ignore[arg-type] # ours
        grads: dict[Tensor, Tensor] = dict(zip(params, self.grads, strict=True))
        copies: dict[Tensor, Tensor] = dict(zip(params, self.weights, strict=True))
        buffers = UndoBuffers()

        def step(keep: Any = optimizer) -> None:  # the stepper does not own its optimizer
            with torch.no_grad():
                if undo:
                    stepper.plan(grads, copies, undo=buffers)
                    stepper.run(None)
                else:
                    stepper.step(grads, copies)

        return self._shared(step, optimizer, params)

    def snapshot_first(self, step: Callable[[], None]) -> Callable[[], None]:
        """A step after a copy of all that it overwrites: undo as it can be had from any optimizer."""
        overwritten = [*self.masters, *(t for slot in self._slots.values() for t in slot)]
        kept = [t.clone() for t in overwritten]

        def both() -> None:
            torch._foreach_copy_(kept, overwritten)
            step()

        return both

    def with_casts(self, make: Make, *, fresh: bool = False) -> Callable[[], None]:
        """Any optimizer between a cast of the gradients and one of the weights.

        Args:
            make: Makes it.
            fresh: Cast to new gradients, as ``grad.float()`` in a training loop does; otherwise to buffers that are
                kept, the best that can be made of it.
        """
        params = self._parameters()
        optimizer = make(params)
        if fresh:

            def loop() -> None:
                for p, grad in zip(params, self.grads, strict=True):
                    p.grad = grad.float()
                optimizer.step()
                optimizer.zero_grad()
                for p, weight in zip(params, self.weights, strict=True):
                    weight.copy_(p.detach())

            return self._shared(loop, optimizer, params)
        self._casts = buffers = self._casts or [torch.zeros_like(p) for p in self.masters]
        for p, buffer in zip(params, buffers, strict=True):
            p.grad = buffer

        def step() -> None:
            torch._foreach_copy_(buffers, self.grads)
            optimizer.step()
            torch._foreach_copy_(self.weights, self.masters)

        return self._shared(step, optimizer, params)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(master) for master in self.masters]

    def _shared(
        self, step: Callable[[], None], optimizer: torch.optim.Optimizer, params: Sequence[Tensor]
    ) -> Callable[[], None]:
        step()  # creates the state
        for name in optimizer.state[params[0]]:
            own = [optimizer.state[p][name] for p in params]
            if isinstance(own[0], Tensor) and own[0].shape == params[0].shape:
                for p, slot in zip(params, self._slots.setdefault(name, own), strict=True):
                    optimizer.state[p][name] = slot
        return step


def deepspeed_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """``DeepSpeedCPUAdam`` in its AdamW mode, where it is installed."""
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError:
        return None
    return lambda params, **options: DeepSpeedCPUAdam(params, adamw_mode=True, **options)


def measure(runs: list[Contender], rounds: int, seconds: float, *, least: int = 9) -> list[list[float]]:
    """Seconds of a step of each contender in each round.

    Args:
        runs: The contenders.
        rounds: At most so many.
        seconds: No new round begins later.
        least: Rounds that are run even so.
    """
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
        if time.perf_counter() > deadline and number + 1 >= least:
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


def put_between(path: Path, name: str, text: str) -> None:
    """Put text between the markers ``<!-- name: ... -->`` and ``<!-- /name -->`` of a document.

    Raises:
        ValueError: The document lacks them.
    """
    lines = path.read_text().splitlines(keepends=True)
    begins = [i for i, line in enumerate(lines) if line.startswith(f"<!-- {name}:")]
    ends = [i for i, line in enumerate(lines) if line.strip() == f"<!-- /{name} -->"]
    if len(begins) != 1 or len(ends) != 1 or ends[0] < begins[0]:
        raise ValueError(f"{path}: one pair of markers <!-- {name}: ... --> and <!-- /{name} --> is needed")
    path.write_text("".join([*lines[: begins[0] + 1], text, *lines[ends[0] :]]))
