"""What is done on the host, by one thread: bucket after bucket, in an order that does not depend on timing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.engines.scaling import Scaling
from lightning_optim.offload.buckets import Early, OffloadBucket
from lightning_optim.offload.masters import GroupOptions
from lightning_optim.offload.options import DetachedOptions
from lightning_optim.offload.trace import Trace
from lightning_optim.offload.transport import Ticket, Transport
from lightning_optim.offload.whole import step_whole
from lightning_optim.optimizers.shards import is_distributed, local, shards_of


class FixedScaling(Scaling):
    """Multiplies gradients by a number that is known, and leaves no step out."""

    def __init__(self, number: float) -> None:
        super().__init__()
        object.__setattr__(self, "number", torch.tensor(number, dtype=torch.float64, device="cpu"))

    def skip(self) -> bool:
        """See :meth:`Scaling.skip`."""
        return False

    def factor(self) -> Tensor | None:
        """See :meth:`Scaling.factor`."""
        return self.number  # type: ignore[attr-defined] # of a frozen dataclass


class HostSide:
    """A thread, and what it does.

    Args:
        options: What was chosen.
        trace: Records what happens when.

    Attributes:
        threads: How many threads a job may use: as many as who steps has, or has been given since. (OpenMP keeps that
            number for each thread; one that asks for itself never hears of ``torch.set_num_threads``.)
        closed: Whether no job is done any more.
    """

    def __init__(self, options: DetachedOptions, trace: Trace | None) -> None:
        self.threads = torch.get_num_threads()
        self.closed = False
        self._options, self._trace = options, trace
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lightning-optim")

    def submit(self, job: Callable[..., None], *args: Any) -> Future[None]:
        """Have a job done, after all that were submitted before it."""
        return self._thread.submit(_in_its_place, self.threads, job, *args)

    def close(self) -> None:
        """End the thread, when all jobs are done."""
        self.closed = True
        self._thread.shutdown()

    # -- jobs ---------------------------------------------------------------------------------------------------

    def fold(self, bucket: OffloadBucket) -> None:
        """Add what has arrived to the sums."""
        with self._recorded("fold", bucket.label):
            sums = bucket.allocate_sums()
            for i in bucket.staged:
                if i in bucket.summed:
                    sums[i].add_(bucket.staging[i])
                else:
                    sums[i].copy_(bucket.staging[i])
            bucket.summed |= bucket.staged
            bucket.staged = set()

    def measure(self, buckets: list[OffloadBucket]) -> None:
        """Find the sum of squares of each bucket's gradients."""
        for bucket in buckets:
            with self._recorded("norm", bucket.label):
                if bucket.stepper is None:
                    bucket.squares = {}
                    for g in map(bucket.gradient, sorted(bucket.present)):
                        where = shards_of(g) if is_distributed(g) else ()
                        mine = torch.view_as_real(local(g).resolve_conj()) if g.is_complex() else local(g)
                        part = torch.linalg.vector_norm(mine.double()).square()
                        bucket.squares.setdefault(where, []).append(part)
                else:
                    self._plan(bucket, scaled=True)
                    bucket.squares = bucket.stepper.local_squares()

    def update_early(self, bucket: OffloadBucket, number: float | None, options: GroupOptions) -> None:
        """Do the step of a bucket before that of the others, as if it would be the same then."""
        self._update(bucket, _scaling(number), options)
        bucket.early = Early(options, number, bucket.present)

    def take_back(self, buckets: list[OffloadBucket]) -> None:
        """As if nothing had been updated early."""
        early = [bucket for bucket in buckets if bucket.early is not None]
        for bucket in early:
            self._forget_early(bucket)
        for bucket in early:
            self._undo(bucket)

    def leave_out(self, buckets: list[OffloadBucket]) -> None:
        """As if there had been no step; first ones are still to come."""
        self.take_back(buckets)
        for bucket in buckets:
            if bucket.stepper is not None:
                bucket.stepper.abandon()

    def forget(self, buckets: list[OffloadBucket]) -> None:
        """Forget gradients, and what was done with them before the step."""
        for bucket in buckets:
            bucket.forget_gradients()
        self.take_back(buckets)

    def step(
        self,
        optimizer: Optimizer,
        buckets: list[OffloadBucket],
        number: float | None,
        options: GroupOptions,
        then: Callable[[OffloadBucket], None] | None,
    ) -> None:
        """The step of all buckets.

        Args:
            optimizer: Whose step it is.
            buckets: Those with gradients, in the order in which they came.
            number: What gradients are multiplied by.
            options: Of the param groups.
            then: Called with each bucket that is done.
        """
        if any(bucket.stepper is None for bucket in buckets):
            with self._recorded("update", "all"):
                step_whole(optimizer, buckets, number)
            for bucket in buckets:
                bucket.unsent |= bucket.present
        # The layers that the next forward pass begins with come first; where it has begun already, those whose
        # gradients the next backward pass brings first.
        for bucket in reversed(buckets) if then is not None else buckets:
            if bucket.stepper is not None:
                early = self._forget_early(bucket)
                if early == Early(options, number, bucket.present):
                    bucket.unsent = set() if early.sent else bucket.unsent | bucket.present
                else:
                    if early is not None:
                        self._undo(bucket)
                    self._update(bucket, _scaling(number), options)
                    bucket.unsent |= bucket.present
            if then is not None:
                then(bucket)

    def step_here(self, buckets: list[OffloadBucket], scaling: Scaling | None, options: GroupOptions) -> None:
        """The step of buckets that stay on the device: by who calls, on the stream of who calls."""
        for bucket in buckets:
            self._update(bucket, scaling, options)

    def send(self, buckets: list[OffloadBucket], transport: Transport, fence: Any) -> None:
        """Have new weights leave for the device: only new ones, as the others are there, and not where they leave."""
        for bucket in buckets:
            if bucket.unsent:
                members, ships = sorted(bucket.unsent), bucket.ships()
                targets = [local(bucket.params[i]).detach() for i in members]
                bucket.sent = transport.send([ships[i] for i in members], targets, bucket.label, fence)
                bucket.unsent, bucket.under_way = set(), members

    def arrive(
        self, bucket: OffloadBucket, ticket: Ticket, *, fold: bool, measure: bool, early: Callable[[], None] | None
    ) -> None:
        """Wait for gradients, and use them as far as they can be.

        Args:
            bucket: The bucket.
            ticket: Of the copy.
            fold: Others are going to be added to them.
            measure: Find their norm.
            early: What else is to be done with them.
        """
        ticket.wait()
        if fold or bucket.summed:
            self.fold(bucket)
        if measure:
            self.measure([bucket])
        if early is not None:
            early()

    def send_early(self, buckets: list[OffloadBucket], options: GroupOptions, transport: Transport, fence: Any) -> None:
        """After the backward pass: have weights leave that need no norm, and were updated in it.

        Not a job: it does not wait for those that are still at work with other buckets.
        """
        for bucket in buckets:
            at_work = not all(job.done() for job in bucket.arrivals)
            if not at_work and bucket.early == Early(options, None, bucket.present):
                bucket.unsent |= bucket.present
                self.send([bucket], transport, fence)
                bucket.early.sent = True

    # -- parts of jobs ------------------------------------------------------------------------------------------

    def _plan(self, bucket: OffloadBucket, *, scaled: bool) -> None:
        assert bucket.stepper is not None  # noqa: S101 # who calls knows
        grads = {bucket.masters[i]: bucket.gradient(i) for i in bucket.present}
        undo = bucket.undo if self._keeps_old(bucket) else None
        bucket.stepper.plan(grads, bucket.copies(), scaled=scaled, undo=undo)

    @staticmethod
    def _forget_early(bucket: OffloadBucket) -> Early | None:
        """What was updated early. If it has left, it is to be sent again, unless that turns out to have been right."""
        early, bucket.early = bucket.early, None
        if early is not None and early.sent:
            bucket.unsent |= early.members
        return early

    def _keeps_old(self, bucket: OffloadBucket) -> bool:
        return self._options.clip == "speculative" and not bucket.on_device

    def _update(self, bucket: OffloadBucket, scaling: Scaling | None, options: GroupOptions) -> None:
        assert bucket.view is not None  # noqa: S101 # who calls knows
        assert bucket.stepper is not None  # noqa: S101
        bucket.sent.wait()  # the last weights may still be on their way
        bucket.view.options = options
        with self._recorded("update", bucket.label):
            try:
                self._plan(bucket, scaled=scaling is not None and scaling.factor() is not None)
            except BaseException:
                bucket.stepper.abandon()
                raise
            try:
                bucket.stepper.run(scaling)
            except BaseException:
                if self._keeps_old(bucket):
                    bucket.stepper.undo()
                bucket.stepper.abandon()
                raise

    def _undo(self, bucket: OffloadBucket) -> None:
        if self._options.clip == "none":
            raise RuntimeError(
                f"detached: {bucket.label} was updated in the backward pass, and then its gradients grew or were "
                "dropped, or its weights, its state or options of its param groups changed: the backward pass is not "
                "always the same, or a window has several and `last` was not set; valid: clip='exact' or "
                "clip='speculative'"
            )
        assert bucket.stepper is not None  # noqa: S101 # nothing else is updated early
        with self._recorded("undo", bucket.label):
            bucket.stepper.undo()

    def _recorded(self, kind: str, label: str) -> Any:
        return nullcontext() if self._trace is None else self._trace.record(kind, label)


def _scaling(number: float | None) -> Scaling | None:
    return None if number is None else FixedScaling(number)


def _in_its_place(threads: int, job: Callable[..., None], *args: Any) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    with torch.no_grad():
        job(*args)
