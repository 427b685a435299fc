"""How gradients leave the device: taken by hooks as a backward pass makes them, or all at once before a step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_optim.offload.away import Away, Kept
from lightning_optim.offload.buckets import OffloadBucket
from lightning_optim.offload.host import HostSide
from lightning_optim.offload.placing import Placement
from lightning_optim.offload.transport import Ticket
from lightning_optim.stepping.shards import is_distributed, local, same_parts

#: From a bucket whose gradients are complete, the update to make on the host before the step, or None.
EarlyUpdate = Callable[[OffloadBucket], Callable[[], None] | None]


class Intake:
    """Starts to fetch gradients as soon as they are complete, and frees them.

    Args:
        host: Receives the gradients.
        placement: Has the buckets.
        overlap: Whether hooks take gradients during the backward pass; otherwise :meth:`collect` takes them.
        patient: Whether to wait for every gradient that any earlier window had, rather than the last window only:
            needed if early updates cannot be undone.

    Attributes:
        last: Whether the backward pass to come is the window's last.
        measures: Whether norms are wanted as soon as gradients are complete.
    """

    def __init__(self, host: HostSide, placement: Placement, *, overlap: bool, patient: bool) -> None:
        self.last = True
        self.measures = False
        self._host, self._placement, self._overlap, self._patient = host, placement, overlap, patient
        self._early: EarlyUpdate = _nothing
        self._watched: dict[Tensor, list[Any]] = {}
        self._awaits_end = False
        # The hooks of a pipeline that was dropped do nothing, but without this they would stay as long as the model.
        weakref.finalize(self, _remove, self._watched)

    def watch(self, bucket: OffloadBucket) -> None:
        """Take the gradients of a bucket from here on."""
        if bucket.watched or not self._overlap or bucket.on_device or any(map(_is_others, bucket.params)):
            return
        for p in bucket.params:
            # A hook that held its owner, or the bucket, would keep masters and state alive as long as the model.
            hook = partial(_on_gradient, weakref.ref(self), weakref.ref(bucket))
            self._watched.setdefault(p, []).append(p.register_post_accumulate_grad_hook(hook))
        bucket.watched = True

    def unwatch(self, params: Iterable[Tensor]) -> None:
        """Take the gradients of these parameters no more, and put those back that were taken already."""
        for p in params:
            if isinstance(p.grad, Away):
                p.grad = p.grad.kept.value()
            _remove({p: self._watched.pop(p, [])})

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
            if not bucket.watched:  # the gradients in their places are of the whole window
                bucket.forget_gradients()
                bucket.leaving = {}
            if not bucket.on_device:
                self._heed(bucket)
                self._ship(bucket)
        self.wait()

    def wait(self) -> None:
        """Wait for gradients that are on their way.

        Raises:
            Exception: Something went wrong with one; it is raised again until gradients are forgotten.
        """
        errors: list[BaseException] = []
        for bucket in self._placement.buckets:
            if not bucket.arrivals:
                bucket.fetched.wait()  # an interrupt may have come before this copy had a job
            bucket.arrivals = [job for job in bucket.arrivals if job.exception() is not None]
            errors += [error for job in bucket.arrivals if (error := job.exception()) is not None]
        if errors:
            raise errors[0]

    def forget(self) -> None:
        """Drop gradients that are on their way, and their errors; then the host may forget the gradients."""
        for bucket in self._placement.buckets:
            for job in bucket.arrivals:
                job.exception()
            for p in bucket.params if bucket.away else ():
                if isinstance(p.grad, Away):
                    p.grad = None
            bucket.away, bucket.dropped, bucket.leaving, bucket.fetched = {}, set(), {}, Ticket()
            bucket.arrivals = []
            bucket.since.clear()
            bucket.fired.clear()
        self._awaits_end = False

    def end_window(self) -> None:
        """After a step, remember how often each gradient was added to."""
        for bucket in self._placement.buckets:
            if bucket.fired:
                bucket.usual = bucket.fired | (bucket.usual if self._patient and bucket.usual else bucket.fired)
            bucket.fired.clear()
        self._awaits_end = False

    def close(self) -> None:
        """Take no more gradients."""
        _remove(self._watched)

    def before_gradient(self, bucket: OffloadBucket, index: int) -> None:
        """Handle that a gradient is going to be added to, whose sum so far may be on the host."""
        self._step_aside(bucket, index)

    def on_gradient(self, bucket: OffloadBucket, p: Tensor) -> None:
        """Handle that a gradient was added to. Gradients of one bucket come from one thread, that of its device."""
        index = bucket.number_of.get(p)
        if index is None or not bucket.watched:
            return
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
            # At its end, the pass ships what is left: the next one would add to it in the gradients' own, shorter type.
            self._awaits_end = True
            torch.autograd.Variable._execution_engine.queue_callback(partial(_on_end, weakref.ref(self)))

    def on_end(self) -> None:
        """Handle the end of a backward pass."""
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
        if bucket.watched and not bucket.present and any(map(_is_others, bucket.params)):
            bucket.watched = False  # other hooks look at the gradients, which stay in place from here on
            return
        places = {i: p.grad for i, p in enumerate(bucket.params)}
        grads = {
            i: g for i, g in places.items() if not (g is None or isinstance(g, Away) or bucket.leaving.get(i) is g)
        }
        if not grads and not bucket.dropped:
            self._let_go(bucket)
            return
        for i, grad in grads.items():
            _check(bucket.params[i], grad, bucket.staging[i].dtype)
        for job in bucket.arrivals:
            job.result()
        bucket.fetched.wait()
        if bucket.early is not None:  # a gradient that was taken for complete has grown, or was dropped
            self._host.submit(self._host.take_back, [bucket]).result()
        bucket.discard()
        if not grads:
            return
        if bucket.staged:
            bucket.arrivals.append(self._host.submit(self._host.fold, bucket))
            bucket.arrivals[-1].result()
        bucket.squares = None
        targets = [bucket.staging[i] for i in grads]
        sources = [_own_part(bucket.params[i], grad) for i, grad in grads.items()]
        ticket = self._placement.transport.fetch(sources, targets, bucket.label)
        # In one statement: whatever breaks off, a gradient is either still to be fetched or known to be fetched.
        bucket.fetched, bucket.staged, bucket.leaving = ticket, set(grads), dict(grads)
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
        self._let_go(bucket)

    def _let_go(self, bucket: OffloadBucket) -> None:
        """Free the gradients that have been fetched; if more is to be added to one, a stand-in takes its place."""
        for i, grad in bucket.leaving.items() if bucket.watched else ():
            p = bucket.params[i]
            if p.grad is not grad:
                continue
            if self.last or is_distributed(p):
                p.grad = None
            else:
                bucket.away[i] = p.grad = Away(Kept(bucket, p), p)
                if len(self._watched[p]) == 1:
                    hook = partial(_before_gradient, weakref.ref(self), weakref.ref(bucket), weakref.ref(p))
                    self._watched[p].append(p.register_hook(hook))
        bucket.leaving = {}

    def _heed(self, bucket: OffloadBucket) -> None:
        """Find stand-ins that were dropped, changed or replaced, and drop their gradients on the host."""
        for i in list(bucket.away):
            p = bucket.params[i]
            if p.grad is not bucket.away[i] or bucket.away[i].kept.changed() is not None:
                self._step_aside(bucket, i)

    def _step_aside(self, bucket: OffloadBucket, index: int) -> None:
        """Remove a gradient's stand-in; whatever somebody has put in its place stays."""
        away = bucket.away.pop(index, None)
        if away is None:
            return
        p = bucket.params[index]
        if p.grad is not away:
            bucket.dropped.add(index)
        elif (changed := away.kept.changed()) is not None:
            bucket.dropped.add(index)
            p.grad = changed
        else:
            p.grad = None


def _nothing(bucket: OffloadBucket) -> None:
    del bucket


def _on_gradient(owner: weakref.ref[Intake], taken: weakref.ref[OffloadBucket], p: Tensor) -> None:
    intake, bucket = owner(), taken()
    if intake is not None and bucket is not None:
        intake.on_gradient(bucket, p)


def _before_gradient(
    owner: weakref.ref[Intake], taken: weakref.ref[OffloadBucket], whose: weakref.ref[Tensor], grad: Tensor
) -> None:
    del grad
    intake, bucket, p = owner(), taken(), whose()
    if intake is not None and bucket is not None and p is not None and p in bucket.number_of:
        intake.before_gradient(bucket, bucket.number_of[p])


def _on_end(owner: weakref.ref[Intake]) -> None:
    if (intake := owner()) is not None:
        intake.on_end()


def _remove(watched: dict[Tensor, list[Any]]) -> None:
    for p, handles in watched.items():
        for handle in handles:
            handle.remove()
        if isinstance(p.grad, Away):
            p.grad = None
    watched.clear()


def _is_others(p: Tensor) -> bool:
    """Whether hooks that are not ours look at a parameter's gradient when it is complete."""
    hooks = getattr(p, "_post_accumulate_grad_hooks", None) or {}
    return any(getattr(hook, "func", None) is not _on_gradient for hook in hooks.values())


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
    """This process's part of a gradient, divided as its parameter is."""
    if is_distributed(p) and not same_parts(p, grad):
        grad = grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined] # of a DTensor
    return local(grad).detach()


def _collective(bucket: OffloadBucket) -> bool:
    """Whether a norm needs communication between processes, which they do in one order, in the step."""
    return any(map(is_distributed, bucket.masters))
