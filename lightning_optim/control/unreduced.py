"""Parameters whose gradients DDP does not reduce: it knows only those that required gradients when it was made.

A layer that is frozen then, and unfrozen later by a finetuning callback, is stepped by each process with its own
gradient, and replicas silently diverge. Here such gradients are averaged when a backward pass ends, as DDP does with
the others, so that hooks, clipping and steps see the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_optim.stepping.shards import local

#: Bytes of gradients that are averaged at a time, as in DDP: memory for a copy of so many is needed.
BUCKET_BYTES = 25 * 2**20

#: What kind of gradient a process has. The largest of all processes' numbers decides.
_ABSENT, _DENSE, _SPARSE = 0, 1, 2


class Unreduced:
    """Averages the gradients that a DDP module leaves to each process.

    All processes must have the same parameters in their optimizers, in the same order, as replicas have.

    Args:
        ddp: A ``DistributedDataParallel`` that has just been made. It reduces the parameters that require gradients
            now, and keeps no record of which these are.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._ddp = ddp
        delayed: set[Tensor] = set(self._ddp._delay_all_reduce_params)
        # DDP looks parameters up by these names, with which it never finds those of the root module itself.
        self._ignored = {
            p
            for where, part in self._ddp.module.named_modules()
            for name, p in part.named_parameters(recurse=False)
            if f"{where}.{name}" in self._ddp.parameters_to_ignore
        } - delayed
        self._alike = set(self._ddp.module.parameters())  # DDP has given all processes the first one's values
        self._reduced = {p for p in self._alike if p.requires_grad} - self._ignored

    def parameters(self, optimizers: Iterable[Optimizer]) -> list[Tensor]:
        """The optimizers' parameters whose gradients DDP does not reduce, except those that it was told to ignore."""
        found = _trained(optimizers)
        return [p for p in found if p not in self._reduced and p not in self._ignored]

    def ignored(self, optimizers: Iterable[Optimizer]) -> list[str]:
        """The names of the parameters that DDP was told to ignore, by ``_ddp_params_and_buffers_to_ignore``."""
        return self._named([p for p in _trained(optimizers) if p in self._ignored])

    def average_after(self, loss: Tensor, optimizers: Sequence[Optimizer]) -> None:
        """Average gradients at the end of the backward pass of this loss. Call it in all processes, or in none.

        Under ``no_sync`` nothing is averaged: as in DDP, the last backward pass of a window averages the whole sum.

        Args:
            loss: The loss that is differentiated.
            optimizers: The optimizers that are going to step.
        """
        if not self._ddp.require_backward_grad_sync or not loss.requires_grad or not self.parameters(optimizers):
            return

        def begins(grad: Tensor) -> None:
            del grad
            handle.remove()
            # All processes get here, whichever of the gradients they have.
            torch.autograd.Variable._execution_engine.queue_callback(partial(self.average, optimizers))

        handle = loss.register_hook(begins)

    @torch.no_grad()
    def average(self, optimizers: Iterable[Optimizer]) -> None:
        """Average the gradients over all processes. Collective.

        A gradient that only some processes have counts as zero in the others; one that none has stays absent.

        Raises:
            RuntimeError: A gradient is sparse, or a parameter is not the same in all processes.
        """
        params = self.parameters(optimizers)
        if not params:
            return
        kinds = torch.tensor([_kind(p.grad) for p in params], dtype=torch.int32, device=local(params[0]).device)
        dist.all_reduce(kinds, dist.ReduceOp.MAX, group=self._ddp.process_group)
        found = kinds.tolist()
        if sparse := [p for p, kind in zip(params, found, strict=True) if kind == _SPARSE]:
            raise RuntimeError(
                f"DDP does not know {', '.join(self._named(sparse))}, which required no gradients when it was set up, "
                "and whose gradients are sparse; valid: sparse=False in nn.Embedding, or requires_grad=True from the "
                "start"
            )
        self._check_alike([p for p in params if p not in self._alike])
        present = [p for p, kind in zip(params, found, strict=True) if kind == _DENSE]
        for p in present:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.average_tensors([local(p.grad) for p in present if p.grad is not None])

    @torch.no_grad()
    def average_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Average tensors over all processes, which must have the same number of them, and alike. Collective."""
        for bucket in _buckets(tensors):
            self._average(bucket)

    def _average(self, grads: list[Tensor]) -> None:
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        flat.mul_(1.0 / dist.get_world_size(self._ddp.process_group))  # first, as DDP does: sums of float16 overflow
        dist.all_reduce(torch.view_as_real(flat) if flat.is_complex() else flat, group=self._ddp.process_group)
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view(grad.shape))

    def _check_alike(self, params: list[Tensor]) -> None:
        """Check that parameters made after DDP was set up are the same in all processes. Collective."""
        if not params:
            return
        first = [local(p).detach().clone() for p in params]
        for mine in first:
            dist.broadcast(
                torch.view_as_real(mine) if mine.is_complex() else mine,
                dist.get_global_rank(self._ddp.process_group, 0),
                group=self._ddp.process_group,
            )
        differs = torch.tensor(
            [not torch.equal(local(p), other) for p, other in zip(params, first, strict=True)],
            dtype=torch.int32,
            device=first[0].device,
        )
        dist.all_reduce(differs, dist.ReduceOp.MAX, group=self._ddp.process_group)
        if strange := [p for p, differ in zip(params, differs.tolist(), strict=True) if differ]:
            raise RuntimeError(
                f"{', '.join(self._named(strange))} came to the optimizer after DDP was set up, with other values in "
                "each process; valid: make parameters before (in configure_model, say, frozen or not), or give all "
                "processes the same values by torch.distributed.broadcast"
            )
        self._alike.update(params)

    def _names(self) -> dict[str, Tensor]:
        return dict(self._ddp.module.named_parameters(remove_duplicate=False))

    def _named(self, params: Sequence[Tensor]) -> list[str]:
        names = {p: name for name, p in reversed(self._names().items())}
        return [names.get(p, f"a parameter of shape {tuple(p.shape)}") for p in params]


def _trained(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    found = (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    return list(dict.fromkeys(p for p in found if p.requires_grad))


def _kind(grad: Tensor | None) -> int:
    if grad is None:
        return _ABSENT
    return _DENSE if grad.layout == torch.strided else _SPARSE


def _buckets(grads: Iterable[Tensor]) -> list[list[Tensor]]:
    """Divide gradients into buckets, each of one type and device, and of limited size."""
    open_: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    done = []
    for grad in grads:
        bucket = open_.setdefault((grad.dtype, grad.device), [])
        bucket.append(grad)
        if sum(one.nbytes for one in bucket) >= BUCKET_BYTES:
            done.append(open_.pop((grad.dtype, grad.device)))
    return [*done, *open_.values()]
