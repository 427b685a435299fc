"""The reference: the rule, tensor by tensor, with torch's own operators."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_optim.engines.base import Bucket, Engine, Scalars, advance
from lightning_optim.engines.progress import Progress, Write
from lightning_optim.engines.scaling import Scaling


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
            # The one conversion to the storage type: round to nearest.
            writes: list[Write] = [partial(stored[name].copy_, value) for name, value in new.items()]
            progress.write([*writes, *(advance(bucket) if index == last else [])])

    @staticmethod
    def _computed(bucket: Bucket, scalars: Scalars, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The new value of each tensor of one parameter that is written."""
        math, update = bucket.layout.math, bucket.update
        loaded = {name: tensor.to(math) for name, tensor in stored.items() if name not in update.outputs}
        new = update.run(**loaded, **scalars)
        own = set(map(id, loaded.values()))
        # What is stored as it was loaded (slots that swap, say) is read before anything is written.
        return {name: value.clone() if id(value) in own else value for name, value in new.items()}
