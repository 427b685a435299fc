"""Weights that land while the next forward pass begins: each layer waits for its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
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


class _Hook:
    """What a module calls first. It stays where it is: a copy of the module, or a pickle, has one that does nothing."""

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


# What was compiled, and calls modules, cannot have the waiting in its graph: the graph breaks there. This is what
# `torch.compiler.disable` sets, which would import the compiler.
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

    What is compiled waits as a whole, before its graph begins; what cannot even do that waits for nothing, so that its
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
    """By ``module.compile()``, or by Lightning, which compiles ``training_step``: hooks would be part of the graph."""
    return module._compiled_call_impl is not None or getattr(module, "_compiler_ctx", None) is not None
