"""Weights that arrive when the next forward pass has begun: each layer waits for its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.offload.buckets import OffloadBucket
from lightning_optim.offload.worker import Job


class Landing:
    """Makes the modules of a model wait, when they are called, for the buckets that hold their weights.

    Only a module's own call waits. Some modules are not called, because others use their weights (the output projection
    of ``nn.MultiheadAttention``): these weights are waited for before everything else, by :meth:`before_all`. If other
    code uses a weight *before* its module is called, this is not noticed.

    Args:
        module: The model.
        receive: Called with buckets whose weights are on their way: makes the next work on the device wait for them.
    """

    def __init__(self, module: nn.Module, receive: Callable[[Sequence[OffloadBucket]], list[BaseException]]) -> None:
        self._receive = weakref.WeakMethod(receive)
        self._left: dict[OffloadBucket, Job] = {}
        self._start: Callable[[], None] = _nothing
        self._owners: dict[Tensor, list[nn.Module]] = {}
        self._called: set[nn.Module] = set()
        self._handles: list[Any] = []
        for part, own in _callers(module):
            for p in own:
                self._owners.setdefault(p, []).append(part)
            if own or part is module:
                self._handles.append(part.register_forward_pre_hook(_Hook(self, own, root=part is module)))

    @property
    def is_pending(self) -> bool:
        """Whether weights are on their way."""
        return bool(self._left)

    @property
    def is_known(self) -> bool:
        """Whether a forward pass was seen, so that it is known which modules are called."""
        return bool(self._called)

    def begin(self, left: Mapping[OffloadBucket, Job], start: Callable[[], None]) -> None:
        """Note that buckets are going to be sent.

        Args:
            left: The buckets, and the job that sends each.
            start: Starts these jobs, should an interrupt have come before they were started.
        """
        self._start = start
        self._left = dict(left)

    def before_all(self) -> None:
        """Wait for the weights that no call of a module waits for."""
        self._land([bucket for bucket in self._left if any(map(self._is_unseen, bucket.params))])

    def finish(self) -> None:
        """Wait for all buckets that are left."""
        self._land(list(self._left))

    def close(self) -> None:
        """Remove the hooks, so that no module waits."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_call(self, module: nn.Module, own: Sequence[Tensor], *, root: bool) -> None:
        """Wait for the weights of a module that is called."""
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
        for bucket in buckets:  # only now: if the waiting is broken off, the next call waits
            self._left.pop(bucket, None)
        if failed:
            raise failed[0]


def _nothing() -> None:
    pass


class _Hook:
    """A forward pre-hook of a module. A copy of the module, or a pickle, has one that does nothing."""

    def __init__(self, owner: Landing, own: Sequence[Tensor], *, root: bool) -> None:
        # A hook that held its owner would keep masters alive as long as the model.
        self._owner, self._own, self._root = weakref.ref(owner), own, root

    def __call__(self, module: nn.Module, args: Any) -> None:
        del args
        if (landing := self._owner()) is not None:
            _outside_of_graphs(landing, module, self._own, self._root)

    def __reduce__(self) -> Any:
        return _copied, ()


def _outside_of_graphs(landing: Landing, module: nn.Module, own: Sequence[Tensor], root: bool) -> None:
    landing.on_call(module, own, root=root)


# Compiled code that calls modules cannot have the waiting in its graph: the graph breaks there. These are the
# attributes that `torch.compiler.disable` sets; a call of that would import the compiler.
_outside_of_graphs._torchdynamo_disable = True  # type: ignore[attr-defined]
_outside_of_graphs._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "lightning-optim: with wait='forward' modules wait for their weights when they are called; valid: wait='step'"
)


def _copied() -> Callable[..., None]:
    return _does_nothing


def _does_nothing(module: nn.Module, args: Any) -> None:
    del module, args


def _callers(module: nn.Module) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """The modules whose calls can wait for weights, and the weights of each.

    A compiled module waits as a whole, before its graph begins. One that was compiled in place cannot do that, and its
    weights are waited for before everything else.
    """
    if _compiled_in_place(module):
        return
    if type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod"):
        yield module, list(module.parameters())
        return
    yield module, list(module.parameters(recurse=False))
    for child in module.children():
        yield from _callers(child)


def _compiled_in_place(module: nn.Module) -> bool:
    """Whether ``module.compile()``, or Lightning, compiled a module in place: hooks would be part of the graph."""
    return module._compiled_call_impl is not None or getattr(module, "_compiler_ctx", None) is not None
