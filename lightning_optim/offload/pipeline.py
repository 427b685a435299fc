"""Detached steps: gradients stream to host memory, masters are updated there, and weights stream back.

What happens when, for each bucket of parameters (about 32 MB of gradients):

1. *fetch*: when the last of its gradients is complete, in the backward pass, they are copied to the host, and freed.
2. *fold*: where gradients accumulate over several backward passes, they are added up on the host.
3. *norm*: the sum of squares, for clipping and for the search for infinite gradients.
4. *update*: one pass of a host kernel: unscale, clip, update, round, write the weight in its own type. After the last
   bucket's norm is known (``clip="exact"``); or at once, to be taken back if that turns out to have been wrong
   (``"speculative"``); or at once (``"none"``).
5. *send*: the weights are copied to the device.

Autograd's threads do the first; one thread of ours does the rest, in an order that does not depend on timing, so that
the results do not either.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.engines.base import Decision
from lightning_optim.engines.scaling import LossScale, Scaling, needs_squares
from lightning_optim.offload.buckets import OffloadBucket
from lightning_optim.offload.host import HostSide
from lightning_optim.offload.masters import GroupOptions, bring_state, masters_in_place
from lightning_optim.offload.options import DetachedOptions
from lightning_optim.offload.placing import Placement
from lightning_optim.offload.replicas import Replicas
from lightning_optim.offload.trace import Trace
from lightning_optim.offload.transport import Transport
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.optimizers.shards import LocalSquares, is_distributed, local, total_squares


class Detached:
    """Steps an optimizer's parameters from masters in host memory.

    The optimizer stays what it is: its param groups with the weights in them, its schedules and hooks; its state is
    in host memory, in the format of always. Who wants a step calls :meth:`step` instead of ``optimizer.step()``.

    Args:
        optimizer: One of ours, or any of torch's: those that we know (``SGD``, ``Adam``, ``AdamW``) are stepped by our
            engines; others run their own step on the masters, which is slower.
        options: See :class:`~lightning_optim.offload.options.DetachedOptions`.
        transport: Between the weights' device and the host; default: by the kind of device.
        replicas: The processes among which masters and state are divided; they have the same weights and gradients.
        overlap: Take gradients as soon as they are complete, and free them. Otherwise they stay where they are until
            the step: where hooks want to see them, or where they are reduced over processes first.
        trace: Records what happens when.

    Attributes:
        last: Whether the backward pass to come is the window's last, after which a step comes. Where gradients
            accumulate, set it to False before the others, so that no update is done too early.
        scaling: How the gradients of the last step were unscaled and clipped.
        expects: What the next step will be given, ``(loss scale or None, max_grad_norm or None)``: what updates before
            the step go by. If it turns out otherwise, they are taken back and done again.

    Raises:
        ValueError: Options that the optimizer cannot serve.

    >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    >>> optimizer = torch.optim.SGD([weight], lr=1e-3)
    >>> detached = Detached(optimizer)
    >>> for _ in range(4):
    ...     weight.float().sum().backward()
    ...     detached.step()
    ...     detached.zero_grad()
    >>> weight.detach(), detached.masters()[weight].detach()
    (tensor([0.9961, 0.9961], dtype=torch.bfloat16), tensor([0.9960, 0.9960]))
    >>> detached.close()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        options: DetachedOptions | None = None,
        *,
        transport: Transport | None = None,
        replicas: Replicas | None = None,
        overlap: bool = True,
        trace: Trace | None = None,
    ) -> None:
        self.options = options or DetachedOptions()
        self.last = True
        self.scaling: Scaling | None = None
        self.expects: tuple[float | None, float | None] = (None, None)
        self.replicas = replicas
        self._optimizer = weakref.ref(optimizer)
        self._placement = Placement(optimizer, self.options, transport, replicas)
        self._overlap = overlap
        self._host = HostSide(self.options, trace)
        self._versions: dict[Tensor, int] = {}
        self._state = optimizer.state
        self._needs_squares = False
        self._unpublished: Future[None] | None = None
        self._handles: list[Any] = []
        self._grow()

    # -- for users ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, *, loss: LossScale | None = None, max_grad_norm: float | None = None) -> None:
        """Update all parameters that have a gradient.

        Args:
            loss: How the loss was scaled, and whether the step is to be left out.
            max_grad_norm: Clip the gradients' global norm to this; default: the optimizer's ``max_grad_norm``.

        Raises:
            RuntimeError: A gradient that is sparse or of another type than its weight; what failed before the step.
            ValueError: Clipping or a loss scale with ``clip="none"``.
        """
        optimizer = self.optimizer
        max_norm = self._placement.max_grad_norm(optimizer) if max_grad_norm is None else max_grad_norm
        self.options.check_step(max_norm, loss)
        self.publish()
        self._grow()
        self._follow()
        self._collect()
        self._needs_squares = needs_squares(max_norm, loss)
        work = [bucket for bucket in self._placement.buckets if bucket.mine and bucket.present]
        if not work and not (self.replicas is not None and self._placement.has_gradients()):
            self._end_window(None)
            return
        squares = self._total(work) if self._needs_squares else None
        scaling = _on_host(max_norm, loss, squares)
        self._end_window(scaling)
        if scaling is not None and scaling.skip():
            if loss is not None:
                loss.found_inf.fill_(1.0)
            self._host.submit(self._host.take_back, work).result()
            return
        factor = None if scaling is None else scaling.factor()
        number = None if factor is None else float(factor)
        transport, delayed = self._placement.transport, self.options.delay_one_step
        fence = transport.fence()
        send = None if delayed else lambda bucket: self._host.send([bucket], transport, fence)
        done = self._host.submit(self._host.step, optimizer, work, number, GroupOptions(optimizer), send)
        if delayed:
            self._unpublished = done
        else:
            done.result()
            self._receive()

    def publish(self) -> None:
        """Wait for an update that was delayed, and have the weights be those after it."""
        if self._unpublished is None:
            return
        done, self._unpublished = self._unpublished, None
        done.result()
        transport = self._placement.transport
        mine = [bucket for bucket in self._placement.buckets if bucket.mine]
        self._host.submit(self._host.send, mine, transport, transport.fence()).result()
        self._receive()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, on the device and on the host."""
        self._wait_for_arrivals()
        self._host.submit(self._host.take_back, self._placement.buckets).result()
        for bucket in self._placement.buckets:
            bucket.forget_gradients()
            bucket.fired.clear()
        Optimizer.zero_grad(self.optimizer, set_to_none)

    def masters(self) -> dict[Tensor, Tensor]:
        """By parameter, its master; only those that this process has."""
        self.publish()
        return {
            place.param: master
            for bucket in self._placement.buckets
            for place, master in zip(bucket.places, bucket.masters, strict=False)
        }

    @contextmanager
    def masters_in_place(self) -> Iterator[None]:
        """While this lasts, the optimizer has the masters for its parameters: for loading a state."""
        with masters_in_place(self.optimizer, self.masters()):
            yield
        self._state = self.optimizer.state

    @torch.no_grad()
    def set_masters(self, values: Mapping[Tensor, Tensor]) -> list[Tensor]:
        """Give masters more bits than the weights have.

        Args:
            values: By parameter, what its master was, as a whole or as this process has it.

        Returns:
            The parameters whose weights are others than these masters would give; these masters are left alone.
        """
        strange = []
        for p, master in self.masters().items():
            value = values.get(p)
            if value is None:
                continue
            mine = local(value).to(local(master).dtype)
            if mine.shape != local(p).shape or not torch.equal(mine.to(p.dtype), local(p).cpu()):
                strange.append(p)
            else:
                local(master).copy_(mine)
        return strange

    @torch.no_grad()
    def read_weights(self) -> None:
        """Have masters follow weights that were set from outside; those that round to their weights keep their bits."""
        for p, master in self.masters().items():
            weight = local(p).to(local(master).device)
            if not torch.equal(local(master).to(p.dtype), weight):
                local(master).copy_(weight)
            self._versions[p] = local(p)._version

    def report(self, *, scaled: bool = False) -> list[Decision]:
        """Which engine steps which parameters, and why."""
        return self._placement.report(self.optimizer, scaled=scaled, notes=self._notes())

    def close(self) -> None:
        """Wait for all that is under way, and let the weights go."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._wait_for_arrivals()
        self.publish()
        self._host.close()
        self._placement.close()

    @property
    def buckets(self) -> Sequence[OffloadBucket]:
        """The parameters, as they travel."""
        return self._placement.buckets

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer; it is not kept alive."""
        if (optimizer := self._optimizer()) is None:
            raise RuntimeError("detached: the optimizer no longer exists")
        return optimizer

    # -- gradients come -----------------------------------------------------------------------------------------

    def _grow(self) -> None:
        """Take in the parameters that require gradients and are new: groups may be added, and unfrozen."""
        first = len(self._placement.buckets)
        for number, bucket in enumerate(self._placement.grow(self.optimizer), start=first):
            for index, p in enumerate(bucket.params):
                self._versions[p] = local(p)._version
                if self._overlap and not bucket.on_device:
                    hook = partial(_on_gradient, weakref.ref(self), number, index)
                    self._handles.append(p.register_post_accumulate_grad_hook(hook))

    def _on_gradient(self, bucket: OffloadBucket, index: int) -> None:
        """A gradient was added to. Gradients of one bucket come from one thread: that of its device."""
        bucket.since.add(index)
        if self.last:
            bucket.fired[index] += 1
        expected = bucket.usual.keys() if bucket.usual else range(len(bucket.places))
        if not bucket.since.issuperset(expected):
            return
        complete = self.last and bucket.usual is not None and bucket.fired >= bucket.usual
        if bucket.usual is None or not self.last or complete:
            self._ship(bucket, complete=complete)

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
            _check(bucket.params[i], grad)
        for job in bucket.arrivals:
            job.result()
        if bucket.early is not None:  # more of a gradient that was taken for complete
            self._host.submit(self._host.take_back, [bucket]).result()
        if bucket.staged:
            self._host.submit(self._host.fold, bucket).result()
        if self._overlap:
            for i in grads:
                bucket.params[i].grad = None
        targets = [bucket.staging[i] for i in grads]
        ticket = self._placement.transport.fetch([local(g).detach() for g in grads.values()], targets, bucket.label)
        bucket.staged = set(grads)
        bucket.squares = None
        known = complete and bucket.stepper is not None
        arrived = partial(
            self._host.arrive,
            bucket,
            ticket,
            fold=not self.last,
            measure=known and self._needs_squares and not _collective(bucket),
            early=partial(self._update_early, bucket) if known and self.options.clip != "exact" else None,
        )
        bucket.arrivals.append(self._host.submit(arrived))

    def _update_early(self, bucket: OffloadBucket) -> None:
        """On the host: as if nothing was to be clipped."""
        scale, max_norm = self.expects
        number = 1.0 / scale if scale is not None else (1.0 if max_norm is not None else None)
        self._host.update_early(bucket, number, GroupOptions(self.optimizer))

    # -- a step -------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Fetch what has not been fetched, and wait for all."""
        for bucket in self._placement.buckets:
            if not self._overlap:
                bucket.forget_gradients()  # those in their places have all of the window in them
            if not bucket.on_device:
                self._ship(bucket)
        self._wait_for_arrivals()

    def _wait_for_arrivals(self) -> None:
        for bucket in self._placement.buckets:
            arrivals, bucket.arrivals = bucket.arrivals, []
            for job in arrivals:
                job.result()

    def _follow(self) -> None:
        """Weights that someone has changed since the last step, averaging or clamping them, say, are the masters.

        And a state that was loaded is the state.
        """
        state = self.optimizer.state
        if state is not self._state:
            bring_state(self.optimizer, self.masters())
            self._state = state
        if any(local(p)._version != version for p, version in self._versions.items()):
            self.read_weights()

    def _total(self, work: list[OffloadBucket]) -> Tensor:
        """The sum of squares of all gradients: in order of the buckets, whatever came first."""
        self._host.submit(self._host.measure, [bucket for bucket in work if bucket.squares is None]).result()
        sums: LocalSquares = {}
        for bucket in work:
            for where, parts in (bucket.squares or {}).items():
                sums.setdefault(where, []).extend(part.sum().reshape(1).cpu() for part in parts)
        total = total_squares(sums).sum() if sums else torch.zeros((), dtype=torch.float64)
        if self.replicas is not None and self._placement.whole is None:
            total = self.replicas.sum(total)
        return total.reshape(1)

    def _receive(self) -> None:
        """Have whatever comes next on the device come after the new weights."""
        for bucket in self._placement.buckets:
            bucket.sent.wait_on_device()
        if self.replicas is not None:
            self.replicas.spread(self._placement.buckets)
        params = [p for bucket in self._placement.buckets for p in bucket.params]
        # Behind torch's back: a later backward through an old weight must fail as after any in-place update.
        torch.autograd.graph.increment_version([local(p) for p in params])
        self._versions = {p: local(p)._version for p in params}

    def _end_window(self, scaling: Scaling | None) -> None:
        self.scaling = scaling
        if isinstance(optimizer := self.optimizer, RuleOptimizer):
            optimizer._stepper.scaling = scaling  # by which it knows its `grad_norm`
        for bucket in self._placement.buckets:
            if bucket.fired:
                bucket.usual = bucket.fired.copy()
            bucket.fired.clear()

    # -- small things -------------------------------------------------------------------------------------------

    def _notes(self) -> list[str]:
        notes = [self.options.described()]
        if not self._overlap:
            notes.append("gradients stay on the device until the step")
        return notes


def _on_gradient(owner: weakref.ref[Detached], number: int, index: int, p: Tensor) -> None:
    # A hook that held its owner, or the bucket, would keep masters and state alive as long as the model.
    del p
    if (detached := owner()) is not None:
        detached._on_gradient(detached._placement.buckets[number], index)


def _check(p: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"detached: a parameter of shape {tuple(p.shape)} has a gradient of layout {grad.layout}; valid: dense "
            "gradients (use sparse=False in nn.Embedding)"
        )
    if grad.dtype != p.dtype or grad.shape != p.shape:
        raise RuntimeError(
            f"detached: a parameter of {p.dtype} and shape {tuple(p.shape)} has a gradient of {grad.dtype} and shape "
            f"{tuple(grad.shape)}; valid: the parameter's own"
        )


def _collective(bucket: OffloadBucket) -> bool:
    """Whether processes must talk to each other to know a norm: they do so in one order, in the step."""
    return any(map(is_distributed, bucket.masters))


def _on_host(max_norm: float | None, loss: LossScale | None, squares: Tensor | None) -> Scaling | None:
    """What is known on the device, on the host: it is waited for here, once."""
    if max_norm is None and loss is None:
        return None
    if loss is not None:
        scale = None if loss.scale is None else loss.scale.cpu()
        loss = LossScale(scale, loss.found_inf.cpu().clone(), loss.check)
    return Scaling(max_norm, loss, squares)
