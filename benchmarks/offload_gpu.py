"""Detached against in-graph steps on a GPU: time, memory, the link, and the largest model under a cap of memory.

Both train the same stack of linear layers with AdamW. In-graph: float32 weights under bfloat16 autocast, with gradients
and state beside them on the device. Detached: bfloat16 weights on the device; masters and state on the host. torchao's
``CPUOffloadOptimizer``, where it is installed: float32 weights under autocast on the device, again on the host, with
the state there.

Without a GPU, ``--rehearse`` runs all of it at a small size on the CPU, where the cap is a sum and not a limit, so that
the code is known to run. What comes out then are no figures.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from common import machine
from torch import nn

import lightning_optim
from lightning_optim.offload import Detached, DetachedOptions

ADAMW: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}

#: Said before any run on a GPU, from the design: 2 bytes a weight and direction over a link of 50 GB/s; 0.8 ns a weight
#: on the host at two cores, and less with more; device memory per weight 2 (+ buckets) against 16.
PREDICTED = {
    "largest model": "5 to 7 times as many weights as in-graph under the same cap: 2 bytes a weight, and gradients "
    "that are freed bucket by bucket, against 16 and a copy for autocast; a few more of activations in both",
    "step time": "1.0 to 1.5 times in-graph where the backward pass takes longer than the host, else the host's time",
    "link": "below a fifth busy at batches that keep the GPU busy",
}


@dataclass(frozen=True)
class Size:
    """What is trained.

    Attributes:
        layers: Linear layers.
        width: Inputs and outputs of each.
        batch: Rows of input; a sixteenth of them for the largest model, whose memory is to be that of weights.
        cap: Share of the device's memory for the largest model.
        steps: That are timed.
    """

    layers: int = 48
    width: int = 4096
    batch: int = 8192
    cap: float = 0.1
    steps: int = 10


REHEARSAL = Size(layers=3, width=32, batch=4, steps=2)
#: Bytes that stand for a device's memory in a rehearsal.
REHEARSED_MEMORY = 2e6


class Stack(nn.Module):
    """Linear layers with residual connections."""

    def __init__(self, layers: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width, device=device, dtype=dtype) for _ in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As for any module."""
        for layer in self.layers:
            x = x + nn.functional.gelu(layer(x))
        return x


@dataclass
class Training:
    """One way of training.

    Attributes:
        step: A forward pass, a backward pass, and a step.
        close: Ends what runs beside it.
        link_bytes: That cross the link in one direction at each step.
        device_bytes: Of weights, gradients and state, as the design says.
    """

    step: Callable[[], None]
    close: Callable[[], None]
    link_bytes: float
    device_bytes: float


def in_graph(size: Size, device: torch.device) -> Training:
    """Everything on the device."""
    model = Stack(size.layers, size.width, device, torch.float32)
    optimizer = lightning_optim.AdamW(model.parameters(), **ADAMW)

    def after() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return _training(model, size, device, after, 0, 16)


def detached(size: Size, device: torch.device, clip: str = "exact") -> Training:
    """Masters and state on the host."""
    model = Stack(size.layers, size.width, device, torch.bfloat16)
    optimizer = lightning_optim.AdamW(model.parameters(), **ADAMW)
    steps = Detached(optimizer, DetachedOptions(clip=clip))  # type: ignore[arg-type] # a literal

    def after(keep: Any = optimizer) -> None:
        steps.step()
        steps.zero_grad()

    training = _training(model, size, device, after, 2, 4)
    training.close = steps.close
    return training


def speculative(size: Size, device: torch.device) -> Training:
    """As :func:`detached`, with updates in the backward pass."""
    return detached(size, device, "speculative")


def torchao(size: Size, device: torch.device) -> Training:
    """With torchao, which has no master weights."""
    from torchao.optim import CPUOffloadOptimizer

    model = Stack(size.layers, size.width, device, torch.float32)
    optimizer = CPUOffloadOptimizer(model.parameters(), torch.optim.AdamW, offload_gradients=True, **ADAMW)

    def after() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return _training(model, size, device, after, 4, 8)


WAYS: dict[str, Callable[[Size, torch.device], Training]] = {
    "in-graph": in_graph,
    "detached, clip=exact": detached,
    "detached, clip=speculative": speculative,
    "torchao CPUOffloadOptimizer": torchao,
}


def _training(
    model: Stack, size: Size, device: torch.device, after: Callable[[], None], link: float, on_device: float
) -> Training:
    x = torch.randn(size.batch, size.width, device=device, dtype=torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters())

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        after()

    return Training(step, lambda: None, link * weights, on_device * weights)


class Bench:
    """Measures on a device.

    Args:
        size: What is trained.
        rehearse: Whether this is a rehearsal on the CPU.
    """

    def __init__(self, size: Size, *, rehearse: bool) -> None:
        self.size, self.rehearse = size, rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")

    def bandwidth(self, megabytes: int = 256) -> float:
        """Of a copy from the device to pinned memory, in bytes per second."""
        nbytes = 2**16 if self.rehearse else megabytes * 2**20
        source = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=not self.rehearse)
        times = []
        for _ in range(5):
            self._wait()
            begin = time.perf_counter()
            target.copy_(source, non_blocking=True)
            self._wait()
            times.append(time.perf_counter() - begin)
        return nbytes / statistics.median(times)

    def steps(self, name: str, bandwidth: float) -> dict[str, Any]:
        """Time of a step, peak of memory, and how busy the link is."""
        with self._fresh():
            training = WAYS[name](self.size, self.device)
            try:
                for _ in range(3):
                    training.step()
                self._wait()
                if not self.rehearse:
                    torch.cuda.reset_peak_memory_stats()
                times = []
                for _ in range(self.size.steps):
                    begin = time.perf_counter()
                    training.step()
                    self._wait()
                    times.append(time.perf_counter() - begin)
                peak = None if self.rehearse else torch.cuda.max_memory_allocated()
            finally:
                training.close()
            seconds = statistics.median(times)
            return {
                "name": name,
                "step_ms": 1e3 * seconds,
                "peak_bytes": peak,
                "link_busy": training.link_bytes / bandwidth / seconds,
            }

    def largest(self, name: str) -> int:
        """Weights of the largest stack that trains for two steps under the cap."""
        low, high = 0, 1
        while self._fits(name, high):
            low, high = high, 2 * high
        while high - low > max(1, low // 32):
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(name, middle) else (low, middle)
        return low * (self.size.width**2 + self.size.width)

    def _fits(self, name: str, layers: int) -> bool:
        size = Size(layers, self.size.width, max(1, self.size.batch // 16), self.size.cap)
        with self._fresh():
            if not self.rehearse:
                torch.cuda.set_per_process_memory_fraction(self.size.cap)
            try:
                training = WAYS[name](size, self.device)
                try:
                    if self.rehearse and training.device_bytes > self.size.cap * REHEARSED_MEMORY:
                        return False
                    for _ in range(2):
                        training.step()
                    self._wait()
                finally:
                    training.close()
            except torch.OutOfMemoryError:
                return False
            finally:
                if not self.rehearse:
                    torch.cuda.set_per_process_memory_fraction(1.0)
            return True

    def _wait(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    @contextmanager
    def _fresh(self) -> Iterator[None]:
        """Without what others have left in memory."""
        try:
            yield
        finally:
            gc.collect()
            if not self.rehearse:
                torch.cuda.empty_cache()


def run(size: Size, *, rehearse: bool) -> dict[str, Any]:
    """Measure, or rehearse."""
    bench = Bench(size, rehearse=rehearse)
    bandwidth = bench.bandwidth()
    rows: list[dict[str, Any]] = []
    left_out = {}
    for name in WAYS:
        try:
            row = bench.steps(name, bandwidth)
        except (ImportError, AssertionError) as error:  # torchao is not installed, or has nothing for this device
            if WAYS[name] is not torchao:
                raise
            left_out[name] = str(error)
            continue
        rows.append({**row, "largest_weights": bench.largest(name)})
        print("rehearsal" if rehearse else rows[-1], name, flush=True)
    return {
        "figures": not rehearse,
        "machine": {**machine(), "gpu": None if rehearse else torch.cuda.get_device_name(), "cuda": torch.version.cuda},
        "size": vars(size),
        "predicted": PREDICTED,
        "link_bytes_per_second": bandwidth,
        "rows": rows,
        "left_out": left_out,
    }
