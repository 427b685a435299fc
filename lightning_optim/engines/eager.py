"""The reference: the Program, tensor by tensor, with torch's own operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.engines.base import Bucket, Engine, Scalars, advance
from lightning_optim.engines.scaling import Scaling
from lightning_optim.rules.interpret import interpret


class EagerEngine(Engine):
    """Runs any rule on anything that torch can compute with, DTensors included."""

    name = "eager"

    @torch.no_grad()
    def run(self, bucket: Bucket, table: Sequence[Scalars], scaling: Scaling | None = None) -> None:
        """See :meth:`Engine.run`."""
        math, program = bucket.layout.math, bucket.update.program
        for index in range(len(bucket)):
            stored = {name: tensors[index] for name, tensors in bucket.tensors.items()}
            loaded = {name: stored[name].to(math) for name in program.loads}
            new = interpret(program, loaded, bucket.scalars(index, table), math)
            own = set(map(id, loaded.values()))
            # What is stored as it was loaded (slots that swap, say) is read before anything is written.
            new = {name: value.clone() if id(value) in own else value for name, value in new.items()}
            for name, value in new.items():
                if isinstance(value, Tensor):
                    stored[name].copy_(value)  # the one conversion to the storage type: round to nearest
                else:
                    stored[name].fill_(value)
        advance(bucket)
