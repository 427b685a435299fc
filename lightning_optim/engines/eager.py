"""The reference: the rule, tensor by tensor, with torch's own operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_optim.engines.base import Bucket, Engine, Scalars, advance
from lightning_optim.engines.scaling import Scaling


class EagerEngine(Engine):
    """Runs any rule on anything that torch can compute with, DTensors included."""

    name = "eager"

    @torch.no_grad()
    def run(self, bucket: Bucket, table: Sequence[Scalars], scaling: Scaling | None = None) -> None:
        """See :meth:`Engine.run`."""
        math = bucket.layout.math
        for index in range(len(bucket)):
            stored = {name: tensors[index] for name, tensors in bucket.tensors.items()}
            loaded = {name: tensor.to(math) for name, tensor in stored.items() if name not in bucket.update.outputs}
            new = bucket.update.run(**loaded, **bucket.scalars(index, table))
            own = set(map(id, loaded.values()))
            # What is stored as it was loaded (slots that swap, say) is read before anything is written.
            new = {name: value.clone() if id(value) in own else value for name, value in new.items()}
            for name, value in new.items():
                stored[name].copy_(value)  # the one conversion to the storage type: round to nearest
        advance(bucket)
