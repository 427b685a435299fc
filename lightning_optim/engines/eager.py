"""The eager engine, the reference: it runs a Program tensor by tensor, with torch's own operators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.base import Bucket, Engine, Scalars, advance
from lightning_optim.engines.progress import Progress, Write
from lightning_optim.engines.scaling import Scaling
from lightning_optim.rules.interpret import interpret


class EagerEngine(Engine):
    """Runs any rule on anything that torch can compute with, DTensors included."""

    name = "eager"

    @torch.no_grad()
    def run(self, bucket: Bucket, table: Sequence[Scalars], scaling: Scaling | None = None) -> None:
        """See :meth:`Engine.run`."""
        progress = bucket.progress or Progress()
        progress.finish()
        last = len(bucket) - 1
        while (index := progress.parts) <= last:
            stored = {name: tensors[index] for name, tensors in bucket.tensors.items()}
            new = self._computed(bucket, bucket.scalars(index, table), stored)
            writes = [_write(stored[name], _divided_as(stored[name], value)) for name, value in new.items()]
            progress.write([*writes, *(advance(bucket) if index == last else [])])

    @staticmethod
    def _computed(bucket: Bucket, scalars: Scalars, stored: dict[str, Tensor]) -> dict[str, Tensor | float]:
        """The new value of each tensor of one parameter that is written."""
        math, program = bucket.layout.math, bucket.update.program
        loaded = {name: stored[name].to(math) for name in program.loads}
        new = interpret(program, loaded, scalars, math)
        own = set(map(id, loaded.values()))
        # A new value that is a loaded tensor itself (slots that swap, say) is copied before anything is written.
        return {name: value.clone() if id(value) in own else value for name, value in new.items()}


def _divided_as(stored: Any, value: Any) -> Any:
    """A new value with the placements of the tensor that it is stored in; made before any write, as it may fail."""
    if not hasattr(value, "placements"):
        return value
    if not hasattr(stored, "placements"):
        return value.full_tensor()
    if value.placements == stored.placements:
        return value
    return value.redistribute(stored.device_mesh, stored.placements)


def _write(stored: Tensor, value: Tensor | float) -> Write:
    """The call that stores a new value: the only conversion to the storage type, which rounds to nearest."""
    return partial(stored.copy_, value) if isinstance(value, Tensor) else partial(stored.fill_, value)
