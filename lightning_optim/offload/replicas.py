"""Processes with the same weights and gradients, which divide masters and state among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_optim.engines.memory import is_dense, is_lazy
from lightning_optim.offload.buckets import OffloadBucket


class Replicas:
    """The processes of a group. All methods except :meth:`assign` are collective.

    Args:
        group: A group of ``torch.distributed``; None: all processes.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def assign(self, buckets: Sequence[OffloadBucket]) -> None:
        """Assign buckets to processes: the largest first, each to the process that has least."""
        loads = [0] * self.world
        for bucket in sorted(buckets, key=lambda bucket: -sum(p.numel() for p in bucket.params)):
            bucket.rank = loads.index(min(loads))
            bucket.mine = bucket.rank == self.rank
            loads[bucket.rank] += sum(p.numel() for p in bucket.params)

    def sum(self, number: Tensor) -> Tensor:
        """The sum over all processes of a number on the host."""
        device = self._device(number)
        total = number.to(device)
        dist.all_reduce(total, group=self._group)
        return total.cpu()

    def spread(self, buckets: Sequence[OffloadBucket]) -> None:
        """Send the weights of each bucket from the process that has its masters to all others."""
        works: list[Any] = []
        copied: list[tuple[Tensor, Tensor]] = []
        for bucket in buckets:
            for p in bucket.params if bucket.rank is not None else ():
                flat = _flat(p)
                if flat is None:
                    flat = p.detach().resolve_conj().resolve_neg().reshape(-1).clone()
                    copied.append((p, flat))
                flat = torch.view_as_real(flat) if flat.is_complex() else flat
                works.append(dist.broadcast(flat, self._source(bucket), group=self._group, async_op=True))
        for work in works:
            work.wait()
        for p, flat in copied:
            p.detach().copy_(flat.view(p.shape))

    def gather(self, bucket: OffloadBucket, own: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Give all processes the tensors that the bucket's process has for each of its parameters.

        Args:
            bucket: The bucket.
            own: For each parameter, tensors of any shape by name; read only in the bucket's process.
        """
        described: list[Any] = [
            [[(name, t.dtype, tuple(t.shape)) for name, t in values.items()] for values in own] if bucket.mine else None
        ]
        dist.broadcast_object_list(described, self._source(bucket), group=self._group)
        found = []
        for index, fields in enumerate(described[0]):
            values = {}
            for name, dtype, shape in fields:
                tensor = own[index][name].contiguous() if bucket.mine else torch.empty(shape, dtype=dtype, device="cpu")
                there = tensor.to(self._device(tensor))
                dist.broadcast(there, self._source(bucket), group=self._group)
                values[name] = there.cpu()
            found.append(values)
        return found

    def _source(self, bucket: OffloadBucket) -> int:
        assert bucket.rank is not None  # noqa: S101 # the caller has checked
        return bucket.rank if self._group is None else dist.get_global_rank(self._group, bucket.rank)

    def _device(self, tensor: Tensor) -> torch.device:
        """The device on which these processes can communicate a tensor."""
        backend = dist.get_backend(self._group)
        return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else tensor.device


def _flat(p: Tensor) -> Tensor | None:
    """A tensor's memory in its own order; None if that has gaps, or holds lazily negated or conjugated values."""
    return p.detach().as_strided((p.numel(),), (1,)) if is_dense(p) and not is_lazy(p) else None
