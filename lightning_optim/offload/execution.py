"""The step of buckets whose gradients have all arrived; once begun, it is completed even after an interrupt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch.optim import Optimizer

from lightning_optim.engines.scaling import Scaling
from lightning_optim.offload.buckets import OffloadBucket
from lightning_optim.offload.host import HostSide, StepProgress
from lightning_optim.offload.landing import Landing
from lightning_optim.offload.masters import GroupOptions
from lightning_optim.offload.norm import FixedScaling, number_of
from lightning_optim.offload.options import DetachedOptions
from lightning_optim.offload.outside import Outside
from lightning_optim.offload.placing import Placement
from lightning_optim.offload.replicas import Replicas
from lightning_optim.offload.transport import Ticket
from lightning_optim.offload.worker import Job
from lightning_optim.rules.rule import UPDATES
from lightning_optim.stepping.shards import local


class Execution:
    """Executes steps, one at a time.

    If something fails before all buckets are planned, the step is not made. From then on it is made in any case: the
    host's thread, which no interrupt reaches, has the jobs, and a waiting that is broken off is repeated.

    Args:
        host: Does the jobs of a step.
        placement: Has the buckets.
        options: The options of detached steps.
        outside: Keeps track of what the weights are.
        replicas: The processes that divide the masters among them.

    Attributes:
        landing: Makes the next forward pass wait for the weights; None if the step itself waits for them.
    """

    def __init__(
        self,
        host: HostSide,
        placement: Placement,
        options: DetachedOptions,
        outside: Outside,
        replicas: Replicas | None,
    ) -> None:
        self.landing: Landing | None = None
        self._host, self._placement, self._outside, self._replicas = host, placement, outside, replicas
        self._delayed = options.delay_one_step
        self._jobs: list[Job] | None = None  # of the step under way; an empty list if other processes do all of it

    @property
    def is_under_way(self) -> bool:
        """Whether a step has begun whose end nobody has waited for."""
        return self._jobs is not None

    def do(self, optimizer: Optimizer, work: Sequence[OffloadBucket], scaling: Scaling | None) -> None:
        """Make the step of buckets whose gradients have all arrived.

        Args:
            optimizer: The optimizer.
            work: The buckets with gradients.
            scaling: How the gradients are unscaled and clipped.
        """
        options, transport, host = GroupOptions(optimizer), self._placement.transport, self._host
        number = number_of(scaling)
        known = FixedScaling.of(number)
        here = [bucket for bucket in work if bucket.on_device]
        travelling = [bucket for bucket in work if not bucket.on_device]
        fence, place = transport.fence(), transport.place()

        def send(bucket: OffloadBucket) -> None:
            host.send([bucket], transport, fence)

        host.submit(host.prepare, travelling, known, options).result()
        if here:
            host.submit(host.prepare, here, scaling, options, place).result()
        then = None if self._delayed else send
        progress = StepProgress()
        at_once = [host.job(host.step, b, scaling, options, None, progress, place, twice=True) for b in here]
        if self._placement.whole is not None and travelling:
            step = self._placement.whole
            whole = host.job(host.step_all, step, optimizer, travelling, number, options, then, twice=True)
            by_bucket = dict.fromkeys(travelling, whole)
        else:
            # The layers with which the next forward pass begins come first. If that pass has begun already, the order
            # is that in which the next backward pass brings gradients.
            order = travelling if self._delayed else travelling[::-1]
            by_bucket = {b: host.job(host.step, b, known, options, then, progress, twice=True) for b in order}
        jobs = [*at_once, *dict.fromkeys(by_bucket.values())]
        landing = self.landing if self.landing is not None and self.landing.is_known else None
        self._jobs = jobs if landing is None else at_once
        if landing is not None:
            landing.begin(by_bucket, partial(host.start, jobs))
        host.start(jobs)
        if self._placement.whole is None:
            _count(optimizer, work)
        # Schedulers look at this to see that a step came before theirs.
        optimizer._opt_called = True  # type: ignore[attr-defined] # torch sets it the same way, from outside
        self.finish(None if landing is None else here)

    def finish(self, buckets: Sequence[OffloadBucket] | None = None) -> None:
        """Wait for the end of a step that is not delayed; if this is broken off, wait again before raising that.

        Args:
            buckets: The buckets whose weights are waited for; default: all.

        Raises:
            BaseException: What failed in the step.
        """
        if self._delayed or self._jobs is None:
            return
        try:
            failed = self._wait(buckets)
        except BaseException:
            self._wait(buckets)
            raise
        if failed:
            raise failed[0]

    def publish(self) -> None:
        """Wait for the end of a step, delayed or not.

        Raises:
            BaseException: What failed in it.
        """
        if not self._delayed or self._jobs is None:
            self.finish()
            return
        host, transport, buckets = self._host, self._placement.transport, self._placement.buckets
        failed = self._failed()
        # Weights that were changed meanwhile are newer than their masters, which follow them.
        for bucket in buckets:
            bucket.follow(self._outside.changed(bucket))
        host.submit(host.send, buckets, transport, transport.fence()).result()
        failed += self.receive(buckets)
        self._jobs = None
        if failed:
            raise failed[0]

    def receive(self, buckets: Sequence[OffloadBucket]) -> list[BaseException]:
        """Make the next work on the device wait for these buckets' new weights.

        Returns:
            The errors of copies that failed. Their weights are sent again with the next step.
        """
        errors: list[BaseException] = []
        for bucket in buckets:
            try:
                bucket.sent.wait_on_device()
            except Exception as error:  # whatever a transport raises
                errors.append(error)
                bucket.sent = Ticket()
                bucket.unsent |= set(bucket.under_way)
        if self._replicas is not None:
            self._replicas.spread(buckets)
        params = [p for bucket in buckets for p in bucket.params]
        # Torch has not seen this update: a later backward through an old weight must fail as after any in-place one.
        torch.autograd.graph.increment_version([local(p) for p in params])
        self._outside.note(params)
        return errors

    def _wait(self, buckets: Sequence[OffloadBucket] | None) -> list[BaseException]:
        if self._jobs is None:
            return []
        failed = self._failed()
        failed += self.receive(self._placement.buckets if buckets is None else buckets)
        self._jobs = None
        return failed

    def _failed(self) -> list[BaseException]:
        """Wait for the jobs, and return their errors; jobs that an interrupt kept from being started are started."""
        jobs = self._jobs or []
        self._host.start(jobs)
        return [error for job in jobs if (error := job.exception()) is not None]


def _count(optimizer: Optimizer, work: Sequence[OffloadBucket]) -> None:
    """Count one more step in the param groups whose steps are counted: buckets step with copies of the groups."""
    for number in {place.group_number for bucket in work for place in bucket.places}:
        group = optimizer.param_groups[number]
        if UPDATES in group:
            group[UPDATES] += 1
