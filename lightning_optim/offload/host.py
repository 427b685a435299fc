"""The jobs on the host, done by one thread: bucket after bucket, in an order that does not depend on timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_optim.engines.scaling import Scaling
from lightning_optim.offload.buckets import Early, OffloadBucket
from lightning_optim.offload.masters import GroupOptions
from lightning_optim.offload.norm import FixedScaling, number_of
from lightning_optim.offload.options import DetachedOptions
from lightning_optim.offload.trace import Trace
from lightning_optim.offload.transport import Ticket, Transport
from lightning_optim.offload.whole import Whole
from lightning_optim.offload.worker import Job, Worker
from lightning_optim.stepping.shards import is_distributed, local, shards_of

#: Makes the context in which the thread runs a job, such as the CUDA stream of the caller.
Place = Callable[[], AbstractContextManager[Any]]


class StepProgress:
    """How far the step of several buckets has come.

    Attributes:
        begun: Whether a weight has changed.
        failed: The buckets whose update has failed.
        refused: The error for which no other bucket is stepped: the first bucket failed twice, with nothing changed.
    """

    def __init__(self) -> None:
        self.begun = False
        self.failed: set[OffloadBucket] = set()
        self.refused: BaseException | None = None


class HostSide:
    """The host's thread, and its jobs.

    This thread makes all changes of masters, state and weights: an interrupt comes up in the main thread, and so breaks
    off the waiting for a step, never the step.

    Args:
        options: The options of detached steps.
        trace: Records what happens when.

    Attributes:
        threads: How many threads a job may use: as many as the thread that calls the step. (OpenMP keeps that number
            for each thread, so that ``torch.set_num_threads`` elsewhere does not reach this one.)
    """

    def __init__(self, options: DetachedOptions, trace: Trace | None) -> None:
        self.threads = torch.get_num_threads()
        self._options, self._trace = options, trace
        self._worker = Worker("lightning-optim")

    @property
    def closed(self) -> bool:
        """Whether the thread does no more jobs."""
        return self._worker.closed

    def job(self, work: Callable[..., None], *args: Any, twice: bool = False) -> Job:
        """Make a job without starting it: a caller that keeps it first can wait for its end even after an interrupt."""
        return Job(partial(_in_its_place, self.threads, work, *args), twice=twice)

    def start(self, jobs: Sequence[Job]) -> None:
        """Start jobs, which are done after all that were started before; starting one again changes nothing."""
        for job in jobs:
            self._worker.do(job)

    def submit(self, work: Callable[..., None], *args: Any) -> Job:
        """Make a job and start it; it is done after all that were submitted before it."""
        job = self.job(work, *args)
        self.start([job])
        return job

    def close(self) -> None:
        """End the thread, when all jobs are done."""
        self._worker.close()

    # -- jobs ---------------------------------------------------------------------------------------------------

    def fold(self, bucket: OffloadBucket) -> None:
        """Add the gradients that have arrived to the sums."""
        with self._recorded("fold", bucket.label):
            sums = bucket.allocate_sums()
            for i in bucket.staged:
                if i in bucket.summed:
                    sums[i].add_(bucket.staging[i])
                else:
                    sums[i].copy_(bucket.staging[i])
            bucket.summed |= bucket.staged
            bucket.staged = set()

    def measure(self, buckets: Sequence[OffloadBucket], place: Place = nullcontext) -> None:
        """Find the sum of squares of each bucket's gradients."""
        with place():
            self._measure(buckets)

    def _measure(self, buckets: Sequence[OffloadBucket]) -> None:
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
        """Update a bucket before the step, with the options and the factor that the step is expected to have."""
        early = Early(options, number, bucket.present)
        try:
            self._update(bucket, FixedScaling.of(number), options)
        finally:
            if bucket.stepped is options:
                bucket.early = early

    def take_back(self, buckets: list[OffloadBucket]) -> None:
        """Undo the early updates of buckets."""
        early = [bucket for bucket in buckets if bucket.early is not None]
        for bucket in early:
            self._forget_early(bucket)
        for bucket in early:
            self._undo(bucket)

    def leave_out(self, buckets: list[OffloadBucket]) -> None:
        """Leave out the step of buckets: undo early updates, and drop plans."""
        self.take_back(buckets)
        self._abandon(buckets)

    def forget(self, buckets: list[OffloadBucket]) -> None:
        """Forget gradients, and what was done with them before the step."""
        for bucket in buckets:
            bucket.forget_gradients()
        self.take_back(buckets)
        self._abandon(buckets)

    def prepare(
        self,
        buckets: Sequence[OffloadBucket],
        scaling: Scaling | None,
        options: GroupOptions,
        place: Place = nullcontext,
    ) -> None:
        """Plan the step of all buckets, so that errors in planning come before anything has changed.

        Args:
            buckets: The buckets with gradients.
            scaling: How gradients are unscaled and clipped.
            options: The options of the param groups.
            place: Makes the context to run in.
        """
        number = number_of(scaling)
        try:
            with place():
                for bucket in buckets:
                    if bucket.stepper is None or bucket.early == Early(options, number, bucket.present):
                        continue
                    if self._forget_early(bucket) is not None:
                        self._undo(bucket)
                    self._plan_update(bucket, scaling, options)
        except BaseException:
            self._abandon(buckets)
            raise

    def step(
        self,
        bucket: OffloadBucket,
        scaling: Scaling | None,
        options: GroupOptions,
        then: Callable[[OffloadBucket], None] | None,
        progress: StepProgress,
        place: Place = nullcontext,
    ) -> None:
        """Make the step of a bucket that was prepared.

        If this fails, call it once more, as the other buckets' steps are not undone: it goes on where it was.

        Args:
            bucket: A bucket with gradients.
            scaling: How they are unscaled and clipped.
            options: The options of the param groups.
            then: Called with the bucket when it is done.
            progress: The progress of the step that this is part of.
            place: Makes the context to run in.
        """
        if progress.refused is not None:
            self._abandon([bucket])
            raise progress.refused
        try:
            with place():
                self._step(bucket, scaling, options)
                progress.begun = True
                if then is not None:
                    then(bucket)
        except BaseException as error:
            if bucket.stepped is not options and bucket in progress.failed and not progress.begun:
                progress.refused = error
            progress.failed.add(bucket)
            raise

    def _step(self, bucket: OffloadBucket, scaling: Scaling | None, options: GroupOptions) -> None:
        if bucket.stepped is options:  # it was updated before, and something failed after that
            bucket.unsent |= bucket.present
        elif (early := bucket.early) is None:
            self._update(bucket, scaling, options)
            bucket.unsent |= bucket.present
        else:
            unsent = set() if early.sent else bucket.unsent | bucket.present
            bucket.unsent, bucket.early, bucket.stepped = unsent, None, options

    def step_all(
        self,
        whole: Whole,
        optimizer: Optimizer,
        buckets: Sequence[OffloadBucket],
        number: float | None,
        options: GroupOptions,
        then: Callable[[OffloadBucket], None] | None,
    ) -> None:
        """Make the step of all buckets at once. If this fails, call it once more.

        Args:
            whole: Makes the step.
            optimizer: The optimizer.
            buckets: The buckets with gradients.
            number: The factor by which gradients are multiplied.
            options: The options of the param groups.
            then: Called with each bucket when all are done.
        """
        if buckets[0].stepped is not options:
            with self._recorded("update", "all"):
                whole.step(optimizer, buckets, number)
            buckets[0].stepped = options
        for bucket in reversed(buckets):
            bucket.unsent |= bucket.present
            if then is not None:
                then(bucket)

    def send(self, buckets: list[OffloadBucket], transport: Transport, fence: Any) -> None:
        """Start to copy new weights to the device, and only these: host copies of the others may be out of date."""
        for bucket in buckets:
            if bucket.unsent:
                members, ships = sorted(bucket.unsent), bucket.ships()
                targets = [local(bucket.params[i]).detach() for i in members]
                bucket.sent = transport.send([ships[i] for i in members], targets, bucket.label, fence)
                bucket.unsent, bucket.under_way = set(), members

    def arrive(
        self, bucket: OffloadBucket, ticket: Ticket, *, fold: bool, measure: bool, early: Callable[[], None] | None
    ) -> None:
        """Wait for gradients, and use them as far as is possible now.

        Args:
            bucket: The bucket.
            ticket: The ticket of the copy.
            fold: Whether other gradients are going to be added to these.
            measure: Whether to find their norm.
            early: The early update to make with them; None: none.
        """
        ticket.wait()
        if fold or bucket.summed:
            self.fold(bucket)
        if measure:
            self.measure([bucket])
        if early is not None:
            early()

    def send_early(self, buckets: list[OffloadBucket], options: GroupOptions, transport: Transport, fence: Any) -> None:
        """After the backward pass, send weights that were updated in it and need no norm.

        This is not a job: it does not wait for jobs that are still at work with other buckets.
        """
        for bucket in buckets:
            at_work = not all(job.done() for job in bucket.arrivals)
            if not at_work and bucket.early == Early(options, None, bucket.present):
                bucket.unsent |= bucket.present
                self.send([bucket], transport, fence)
                bucket.early.sent = True

    # -- parts of jobs ------------------------------------------------------------------------------------------

    def _plan(self, bucket: OffloadBucket, *, scaled: bool) -> None:
        assert bucket.stepper is not None  # noqa: S101 # the caller has checked
        bucket.planned = None
        grads = {bucket.masters[i]: bucket.gradient(i) for i in bucket.present}
        undo = bucket.undo if self._keeps_old(bucket) else None
        bucket.stepper.plan(grads, bucket.copies(), scaled=scaled, undo=undo)

    def _plan_update(self, bucket: OffloadBucket, scaling: Scaling | None, options: GroupOptions) -> None:
        assert bucket.view is not None  # noqa: S101 # the caller has checked
        bucket.view.options = options
        bucket.aim()
        scaled = scaling is not None and scaling.factor() is not None
        self._plan(bucket, scaled=scaled)
        bucket.planned = options

    @staticmethod
    def _abandon(buckets: Sequence[OffloadBucket]) -> None:
        """Drop what was planned: a first step is then still a first one."""
        for bucket in buckets:
            bucket.planned = None
            if bucket.stepper is not None:
                bucket.stepper.abandon()

    @staticmethod
    def _forget_early(bucket: OffloadBucket) -> Early | None:
        """Forget a bucket's early update, and return it. If its weights were sent, they are to be sent again."""
        early, bucket.early = bucket.early, None
        if early is not None and early.sent:
            bucket.unsent |= early.members
        return early

    def _keeps_old(self, bucket: OffloadBucket) -> bool:
        return self._options.clip == "speculative" and not bucket.on_device

    def _update(self, bucket: OffloadBucket, scaling: Scaling | None, options: GroupOptions) -> None:
        """Update a bucket. If this raises, the bucket is as before, or ``bucket.stepped`` is ``options``."""
        stepper = bucket.stepper
        assert stepper is not None  # noqa: S101 # the caller has checked
        runs = False
        with self._recorded("update", bucket.label):
            try:
                bucket.sent.wait()  # the last weights may still be on their way
                if bucket.planned is not options:
                    self._plan_update(bucket, scaling, options)
                bucket.planned, runs = None, True
                stepper.run(scaling)
                bucket.stepped = options
            except BaseException:
                if runs and stepper.has_written:
                    bucket.stepped = options
                else:
                    self._abandon([bucket])
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


def _in_its_place(threads: int, job: Callable[..., None], *args: Any) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    with torch.no_grad():
        job(*args)
