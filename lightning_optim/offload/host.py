"""What is done on the host, by one thread: bucket after bucket, in an order that does not depend on timing."""

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

#: Where a job is to run: entered by the thread, as where streams are concerned who called is meant.
Place = Callable[[], AbstractContextManager[Any]]


class StepProgress:
    """How far the step of several buckets has come.

    Attributes:
        begun: Whether a weight has changed.
        failed: The buckets whose update has failed.
        refused: Why no other bucket is to be stepped: the first one could not be.
    """

    def __init__(self) -> None:
        self.begun = False
        self.failed: set[OffloadBucket] = set()
        self.refused: BaseException | None = None


class HostSide:
    """A thread, and what it does.

    All that changes masters, state and weights is done by it: an interrupt comes up in the main thread, and so breaks
    off the waiting for a step, never the step.

    Args:
        options: What was chosen.
        trace: Records what happens when.

    Attributes:
        threads: How many threads a job may use: as many as who steps has, or has been given since. (OpenMP keeps that
            number for each thread; one that asks for itself never hears of ``torch.set_num_threads``.)
    """

    def __init__(self, options: DetachedOptions, trace: Trace | None) -> None:
        self.threads = torch.get_num_threads()
        self._options, self._trace = options, trace
        self._worker = Worker("lightning-optim")

    @property
    def closed(self) -> bool:
        """Whether no job is done any more."""
        return self._worker.closed

    def job(self, work: Callable[..., None], *args: Any, twice: bool = False) -> Job:
        """A job that is still to be started: who keeps it first can see to its end, whatever breaks off."""
        return Job(partial(_in_its_place, self.threads, work, *args), twice=twice)

    def start(self, jobs: Sequence[Job]) -> None:
        """Have jobs done, after all that were started before them; those that were started already stay so."""
        for job in jobs:
            self._worker.do(job)

    def submit(self, work: Callable[..., None], *args: Any) -> Job:
        """Have a job done, after all that were submitted before it."""
        job = self.job(work, *args)
        self.start([job])
        return job

    def close(self) -> None:
        """End the thread, when all jobs are done."""
        self._worker.close()

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
        """Do the step of a bucket before that of the others, as if it would be the same then."""
        early = Early(options, number, bucket.present)
        try:
            self._update(bucket, FixedScaling.of(number), options)
        finally:
            if bucket.stepped is options:
                bucket.early = early

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
        """Plan the step of all buckets: what can go wrong in that does so before anything has changed.

        Args:
            buckets: Those with gradients.
            scaling: How gradients are unscaled and clipped.
            options: Of the param groups.
            place: Where to run.
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
        """The step of a bucket that was prepared.

        If it fails it is to be called once more, as the others' steps are not undone: it goes on where it was.

        Args:
            bucket: It has gradients.
            scaling: How they are unscaled and clipped.
            options: Of the param groups.
            then: Called with the bucket when it is done.
            progress: Of the step that this is part of.
            place: Where to run.
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
        if bucket.stepped is options:  # and something failed after that
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
        """The step of all buckets at once. If it fails it is to be called once more.

        Args:
            whole: What does it.
            optimizer: Whose step it is.
            buckets: Those with gradients.
            number: What gradients are multiplied by.
            options: Of the param groups.
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
        bucket.planned = None
        grads = {bucket.masters[i]: bucket.gradient(i) for i in bucket.present}
        undo = bucket.undo if self._keeps_old(bucket) else None
        bucket.stepper.plan(grads, bucket.copies(), scaled=scaled, undo=undo)

    def _plan_update(self, bucket: OffloadBucket, scaling: Scaling | None, options: GroupOptions) -> None:
        assert bucket.view is not None  # noqa: S101 # who calls knows
        bucket.view.options = options
        bucket.aim()
        scaled = scaling is not None and scaling.factor() is not None
        self._plan(bucket, scaled=scaled)
        bucket.planned = options

    @staticmethod
    def _abandon(buckets: Sequence[OffloadBucket]) -> None:
        """Let go of what was planned: first steps are still to come."""
        for bucket in buckets:
            bucket.planned = None
            if bucket.stepper is not None:
                bucket.stepper.abandon()

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
        """Update a bucket. If this raises, it is as before, or ``bucket.stepped`` is ``options``."""
        stepper = bucket.stepper
        assert stepper is not None  # noqa: S101 # who calls knows
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
