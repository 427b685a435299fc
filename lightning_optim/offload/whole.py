"""Steps of optimizers that our engines do not know: on the masters, by the optimizer's own ``step``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.offload.buckets import OffloadBucket
from lightning_optim.offload.masters import masters_in_place
from lightning_optim.stepping.shards import local


def step_whole(optimizer: Optimizer, work: Sequence[OffloadBucket], factor: float | None) -> None:
    """Have an optimizer step its masters, and make the weights that are to be sent.

    Args:
        optimizer: Any.
        work: The buckets with gradients.
        factor: What gradients are multiplied by.
    """
    masters = {p: master for bucket in work for p, master in zip(bucket.params, bucket.masters, strict=True)}
    stepped: list[Tensor] = []
    try:
        for bucket in work:
            bucket.sent.wait()
            for i in bucket.present:
                master = bucket.masters[i]
                grad = bucket.gradient(i).to(master.dtype)
                master.grad = grad if factor is None else grad * factor
                stepped.append(master)
        with torch.no_grad(), masters_in_place(optimizer, masters):
            # Not what hangs on the instance: hooks and schedulers count the step that led here.
            inspect.unwrap(type(optimizer).step)(optimizer)
    finally:
        for master in stepped:
            master.grad = None
    for bucket in work:
        for i in bucket.present if bucket.outgoing is not None else ():
            bucket.ships()[i].copy_(local(bucket.masters[i]))
