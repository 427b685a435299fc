"""A step's launches recorded as a CUDA graph, which one call replays.

Data that change from step to step (the addresses of gradients, the scalars of every param group) are not in the graph:
they are sent to tables on the device before each replay, where the kernels read them. So gradients may be new tensors
at every step, and schedules go on; only another set of tensors needs another graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_optim.engines.base import Bucket, Engine, Scalars
from lightning_optim.engines.scaling import LossScale, Scaling, needs_squares
from lightning_optim.engines.triton.engine import TritonEngine

#: Types of devices that have CUDA graphs; the CPU, on which Triton's interpreter runs, has none.
DEVICES = ("cuda",)


def record(launches: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Record the kernels that ``launches`` launches, without running them; every call of the result runs them."""
    graph = torch.cuda.CUDAGraph()
    # A stream of this device's own, since torch's default stream for captures belongs to the device that captured
    # first. Other threads (data loaders that pin memory, say) may go on meanwhile.
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        launches()
    return graph.replay


class CapturedSteps:
    """Steps buckets by a CUDA graph, which is recorded at a step that is like the one before it."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._work: list[Any] = []  # keeps the buckets of the key alive: another one could get the same id
        self._replay: Callable[[], None] | None = None
        self._scaling: Scaling | None = None

    @staticmethod
    def rejects(work: Sequence[tuple[Engine, Bucket]]) -> str | None:
        """Why steps of these buckets cannot be captured, or None if they can."""
        for engine, bucket in work:
            if not isinstance(engine, TritonEngine):
                return f"the {engine.name} engine runs {bucket.label}"
        for _, bucket in work:
            if bucket.device.type not in DEVICES:
                return f"the weights are on {bucket.device}"
        devices = sorted({str(bucket.device) for _, bucket in work})
        return None if len(devices) == 1 else f"the weights are on {len(devices)} devices: {', '.join(devices)}"

    def run(
        self,
        work: Sequence[tuple[TritonEngine, Bucket]],
        table: Callable[[Bucket], Sequence[Scalars]],
        max_norm: float | None,
        loss: LossScale | None,
    ) -> Scaling | None:
        """One step; returns how its gradients were scaled."""
        for engine, bucket in work:
            engine.send(bucket, table(bucket), max_norm)

        def launches() -> None:
            squares = None
            if needs_squares(max_norm, loss):
                sizes = [engine.parts(bucket) for engine, bucket in work]
                squares = torch.zeros(sum(sizes), dtype=torch.float64, device=work[0][1].device)
                for (engine, bucket), part in zip(work, squares.split(sizes), strict=True):
                    engine.launch_squares(bucket, part)
            self._scaling = Scaling(max_norm, loss, squares) if max_norm is not None or loss is not None else None
            for engine, bucket in work:
                engine.launch(bucket, self._scaling or Scaling())

        key = (
            *(place for engine, bucket in work for place in engine.places(bucket)),
            max_norm is None,
            None if loss is None else (_place(loss.scale), _place(loss.found_inf), loss.check),
        )
        if key != self._key:
            # The first step of its kind is not recorded: it compiles the kernels.
            self._key, self._replay = None, None
            launches()
            self._key, self._work = key, list(work)
            return self._scaling
        if self._replay is None:
            self._replay = record(launches, work[0][1].device)
        self._replay()
        return self._scaling


def _place(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
