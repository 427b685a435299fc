"""Weights that land while the next forward pass begins: each layer waits for its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.offload.buckets import OffloadBucket
from lightning_optim.offload.worker import Job


class Landing:
    """Has the modules of a model wait for the buckets that hold their weights, when they are called.

    A module's own call is what waits. Weights of modules that were not called in the first forward passes, because
    others use them (the output projection of ``nn.MultiheadAttention``), are waited for before everything else, by
    :meth:`before_all`. A weight that is used *before* its module is called, and not by it, is not seen.

    Args:
        module: The model.
        receive: Called with a bucket whose weights are on their way: whatever comes next on the device comes after.
    """

    def __init__(self, module: nn.Module, receive: Callable[[Sequence[OffloadBucket]], list[BaseException]]) -> None:
        self._receive = weakref.WeakMethod(receive)
        self._left: dict[OffloadBucket, Job] = {}
        self._start: Callable[[], None] = _nothing
        self._owners: dict[Tensor, list[nn.Module]] = {}
        self._called: set[nn.Module] = set()
        self._handles: list[Any] = []
        for part in module.modules():
            own = list(part.parameters(recurse=False))
            for p in own:
                self._owners.setdefault(p, []).append(part)
            if own or part is module:
                hook = _before_call(weakref.ref(self), own, root=part is module)
                self._handles.append(part.register_forward_pre_hook(hook))

    @property
    def is_pending(self) -> bool:
        """Whether weights are on their way."""
        return bool(self._left)

    @property
    def is_known(self) -> bool:
        """Whether a forward pass was seen, so that it is known who waits."""
        return bool(self._called)

    def begin(self, left: Mapping[OffloadBucket, Job], start: Callable[[], None]) -> None:
        """Buckets are going to be sent.

        Args:
            left: Those that are, and what sends each.
            start: Has these jobs done, if it was broken off before they were started.
        """
        self._start = start
        self._left = dict(left)

    def before_all(self) -> None:
        """Wait for the weights that no call of a module waits for."""
        self._land([bucket for bucket in self._left if any(map(self._is_unseen, bucket.params))])

    def finish(self) -> None:
        """Wait for all that is left."""
        self._land(list(self._left))

    def close(self) -> None:
        """Wait no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_call(self, module: nn.Module, own: Sequence[Tensor], *, root: bool) -> None:
        """A module is called."""
        if torch.is_grad_enabled():  # a validation may call what a training step does not
            self._called.add(module)
        if not self._left:
            return
        if root:
            self.before_all()
        needed = set(own)
        self._land([bucket for bucket in self._left if not needed.isdisjoint(bucket.params)])

    def _is_unseen(self, p: Tensor) -> bool:
        return not any(owner in self._called for owner in self._owners.get(p, ()))

    def _land(self, buckets: Sequence[OffloadBucket]) -> None:
        if not buckets:
            return
        self._start()
        failed = [error for bucket in buckets if (error := self._left[bucket].exception()) is not None]
        if (receive := self._receive()) is not None:
            failed += receive(buckets)
        for bucket in buckets:  # not before: if the waiting is broken off, the next one waits
            self._left.pop(bucket, None)
        if failed:
            raise failed[0]


def _nothing() -> None:
    pass


def _before_call(owner: weakref.ref[Landing], own: Sequence[Tensor], *, root: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        del args
        # A hook that held its owner would keep masters alive as long as the model.
        if (landing := owner()) is not None:
            landing.on_call(module, own, root=root)

    return hook
