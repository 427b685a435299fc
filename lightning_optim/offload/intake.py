"""How gradients leave the device: taken by hooks as a backward pass makes them, or all at once before a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_optim.offload.buckets import OffloadBucket
from lightning_optim.offload.host import HostSide
from lightning_optim.offload.placing import Placement
from lightning_optim.optimizers.shards import is_distributed, local, same_parts

#: For a bucket whose gradients are complete: what is done with them on the host before the step, if anything.
EarlyUpdate = Callable[[OffloadBucket], Callable[[], None] | None]


class Intake:
    """Starts to fetch gradients as soon as they are complete, and frees them.

    Args:
        host: Receives them.
        placement: Has the buckets.
        overlap: Whether hooks take gradients during the backward pass; otherwise :meth:`collect` takes them.
        patient: Wait for every gradient that any window had before, not the last one only: where what is done with
            complete gradients cannot be taken back.

    Attributes:
        last: Whether the backward pass to come is the window's last.
        measures: Whether norms are wanted as soon as gradients are complete.
    """

    def __init__(self, host: HostSide, placement: Placement, *, overlap: bool, patient: bool) -> None:
        self.last = True
        self.measures = False
        self._host, self._placement, self._overlap, self._patient = host, placement, overlap, patient
        self._early: EarlyUpdate = _nothing
        self._handles: list[Any] = []
        self._awaits_end = False
        # Hooks of a pipeline that was dropped do nothing; but they would stay for as long as the model.
        weakref.finalize(self, _remove, self._handles)

    def watch(self, bucket: OffloadBucket) -> None:
        """Take the gradients of a bucket from here on."""
        if not self._overlap or bucket.on_device:
            return
        for index, p in enumerate(bucket.params):
            # A hook that held its owner, or the bucket, would keep masters and state alive as long as the model.
            hook = partial(_on_gradient, weakref.ref(self), weakref.ref(bucket), index)
            self._handles.append(p.register_post_accumulate_grad_hook(hook))

    def update_early(self, early: EarlyUpdate) -> None:
        """Say what is to be done with complete gradients before the step.

        Args:
            early: A bound method, whose object is not kept alive.
        """
        found = weakref.WeakMethod(early)
        self._early = lambda bucket: method(bucket) if (method := found()) is not None else None

    def collect(self) -> None:
        """Fetch what has not been fetched, and wait for all."""
        for bucket in self._placement.buckets:
            if not self._overlap:
                bucket.forget_gradients()  # those in their places have all of the window in them
            if not bucket.on_device:
                self._ship(bucket)
        self.wait()

    def wait(self) -> None:
        """Wait for gradients that are on their way.

        Raises:
            Exception: What went wrong with one, now and until gradients are forgotten.
        """
        errors: list[BaseException] = []
        for bucket in self._placement.buckets:
            bucket.arrivals = [job for job in bucket.arrivals if job.exception() is not None]
            errors += [error for job in bucket.arrivals if (error := job.exception()) is not None]
        if errors:
            raise errors[0]

    def forget(self) -> None:
        """Let go of what is on its way, and of what went wrong with it; then the host may forget the gradients."""
        for bucket in self._placement.buckets:
            for job in bucket.arrivals:
                job.exception()
            bucket.arrivals = []
            bucket.since.clear()
            bucket.fired.clear()
        self._awaits_end = False

    def end_window(self) -> None:
        """After a step: keep in mind how often each gradient was added to."""
        for bucket in self._placement.buckets:
            if bucket.fired:
                bucket.usual = bucket.fired | (bucket.usual if self._patient and bucket.usual else bucket.fired)
            bucket.fired.clear()
        self._awaits_end = False

    def close(self) -> None:
        """Take no gradients any more."""
        _remove(self._handles)

    def on_gradient(self, bucket: OffloadBucket, index: int) -> None:
        """A gradient was added to. Gradients of one bucket come from one thread: that of its device."""
        bucket.since.add(index)
        if self.last:
            bucket.fired[index] += 1
        expected = bucket.usual.keys() if bucket.usual else range(len(bucket.places))
        if bucket.since.issuperset(expected):
            complete = self.last and bucket.usual is not None and bucket.fired >= bucket.usual
            if bucket.usual is None or not self.last or complete:
                self._ship(bucket, complete=complete)
                return
        if not self._awaits_end:
            # What this pass leaves behind is not to be added to by the next in the gradients' own, shorter type.
            self._awaits_end = True
            torch.autograd.Variable._execution_engine.queue_callback(partial(_on_end, weakref.ref(self)))

    def on_end(self) -> None:
        """A backward pass has ended."""
        self._awaits_end = False
        for bucket in self._placement.buckets:
            if bucket.since:
                self._ship(bucket)

    @torch.no_grad()
    def _ship(self, bucket: OffloadBucket, *, complete: bool = False) -> None:
        """Start to fetch the gradients that a bucket's parameters have."""
        bucket.since.clear()
        if not bucket.mine:
            return
        grads = {i: p.grad for i, p in enumerate(bucket.params) if p.grad is not None}
        if not grads:
            return
        for i, grad in grads.items():
            _check(bucket.params[i], grad, bucket.staging[i].dtype)
        for job in bucket.arrivals:
            job.result()
        if bucket.early is not None:  # more of a gradient that was taken for complete
            self._host.submit(self._host.take_back, [bucket]).result()
        if bucket.staged:
            self._host.submit(self._host.fold, bucket).result()
        bucket.squares = None
        targets = [bucket.staging[i] for i in grads]
        sources = [_own_part(bucket.params[i], grad) for i, grad in grads.items()]
        ticket = self._placement.transport.fetch(sources, targets, bucket.label)
        bucket.staged = set(grads)
        if self._overlap:
            for i in grads:
                bucket.params[i].grad = None
        known = complete and bucket.stepper is not None
        arrived = partial(
            self._host.arrive,
            bucket,
            ticket,
            fold=not self.last,
            measure=known and self.measures and not _collective(bucket),
            early=self._early(bucket) if known else None,
        )
        bucket.arrivals.append(self._host.submit(arrived))


def _nothing(bucket: OffloadBucket) -> None:
    del bucket


def _on_gradient(owner: weakref.ref[Intake], taken: weakref.ref[OffloadBucket], index: int, p: Tensor) -> None:
    del p
    intake, bucket = owner(), taken()
    if intake is not None and bucket is not None:
        intake.on_gradient(bucket, index)


def _on_end(owner: weakref.ref[Intake]) -> None:
    if (intake := owner()) is not None:
        intake.on_end()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _check(p: Tensor, grad: Tensor, dtype: torch.dtype) -> None:
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"detached: a parameter of shape {tuple(p.shape)} has a gradient of layout {grad.layout}; valid: dense "
            "gradients (use sparse=False in nn.Embedding)"
        )
    if grad.dtype != dtype or grad.shape != p.shape:
        raise RuntimeError(
            f"detached: a parameter of {dtype} and shape {tuple(p.shape)} has a gradient of {grad.dtype} and shape "
            f"{tuple(grad.shape)}; valid: what the parameter had when it was taken over"
        )
    if is_distributed(p) != is_distributed(grad):
        raise RuntimeError(
            f"detached: a {type(p).__name__} of shape {tuple(p.shape)} has a gradient that is a {type(grad).__name__}; "
            "valid: both divided over processes, or none"
        )


def _own_part(p: Tensor, grad: Tensor) -> Tensor:
    """What this process has of a gradient, divided as its parameter is."""
    if is_distributed(p) and not same_parts(p, grad):
        grad = grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined] # of a DTensor
    return local(grad).detach()


def _collective(bucket: OffloadBucket) -> bool:
    """Whether processes must talk to each other to know a norm: they do so in one order, in the step."""
    return any(map(is_distributed, bucket.masters))
