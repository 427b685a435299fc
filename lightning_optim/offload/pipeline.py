"""Detached steps: gradients stream to host memory, masters are updated there, and weights stream back.

What happens when, for each bucket of parameters (about 32 MB of gradients):

1. *fetch*: when the last of its gradients is complete, in the backward pass, they are copied to the host, and freed.
2. *fold*: where gradients accumulate over several backward passes, they are added up on the host.
3. *norm*: the sum of squares, for clipping and for the search for infinite gradients.
4. *update*: one pass of a host kernel: unscale, clip, update, round, write the weight in its own type. It runs when the
   last bucket's norm is known (``clip="exact"``); or at once, to be undone if that turns out to have been wrong
   (``"speculative"``); or at once (``"none"``).
5. *send*: the weights are copied to the device.

Autograd's threads do the first; one thread of ours does the rest, in an order that does not depend on timing, so that
the results do not either.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.engines.base import Decision
from lightning_optim.engines.scaling import LossScale, Scaling, needs_squares
from lightning_optim.offload.buckets import OffloadBucket
from lightning_optim.offload.execution import Execution
from lightning_optim.offload.host import HostSide
from lightning_optim.offload.intake import Intake
from lightning_optim.offload.landing import Landing
from lightning_optim.offload.masters import GroupOptions, masters_in_place, part_of
from lightning_optim.offload.norm import scaling_on_host, summed_squares
from lightning_optim.offload.options import DetachedOptions
from lightning_optim.offload.outside import Outside
from lightning_optim.offload.placing import Placement
from lightning_optim.offload.replicas import Replicas
from lightning_optim.offload.trace import Trace
from lightning_optim.offload.transport import Transport
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.stepping.method import Inputs
from lightning_optim.stepping.shards import local


class Detached:
    """Steps an optimizer's parameters from masters in host memory.

    A step that fails, or is broken off by an interrupt, is done as a whole or not at all. If a bucket's update fails in
    the middle, the other updates are still done, and this one is tried once more; the error is raised in any case.

    The optimizer keeps its param groups with the weights in them, its schedules and its hooks. Its state is in host
    memory, in the usual format. To step it, call :meth:`step` instead of ``optimizer.step()``.

    Args:
        optimizer: One of ours, or any of torch's: those that we know (``SGD``, ``Adam``, ``AdamW``) are stepped by our
            engines; others run their own step on the masters, which is slower.
        options: See :class:`~lightning_optim.offload.options.DetachedOptions`.
        transport: The transport between the weights' device and the host; default: chosen by the kind of device.
        replicas: The processes among which masters and state are divided; they have the same weights and gradients.
        overlap: Take gradients as soon as they are complete, and free them. If False, they stay in place until the
            step, for hooks that look at them, or for a reduction over processes.
        trace: Records what happens when.
        module: The module that has the weights; needed for ``wait="forward"``.

    Attributes:
        last: Whether the backward pass to come is the window's last, after which a step comes. Where gradients
            accumulate, set it to False before the others, so that no update is done too early.
        scaling: How the gradients of the last step were unscaled and clipped.
        expects: What the next step is expected to be given, ``(loss scale or None, max_grad_norm or None)``. Updates
            before the step use it; if the step is given something else, they are undone and done again.

    Raises:
        ValueError: The optimizer cannot be stepped with these options.

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
        module: nn.Module | None = None,
    ) -> None:
        self.options = options or DetachedOptions()
        waits = self.options.wait == "forward"
        if waits and (module is None or replicas is not None):
            raise ValueError("wait='forward' needs module=, and one process; valid: wait='step'")
        self.scaling: Scaling | None = None
        self.expects: tuple[float | None, float | None] = (None, None)
        self.replicas = replicas
        self._optimizer = weakref.ref(optimizer)
        self._placement = Placement(optimizer, self.options, transport, replicas)
        self._overlap = overlap
        self._host = HostSide(self.options, trace)
        self._intake = Intake(self._host, self._placement, overlap=overlap, patient=self.options.clip == "none")
        self._intake.update_early(self._early_update)
        self._outside = Outside(optimizer)
        self._awaited: dict[Tensor, Tensor] = {}
        self._execution = Execution(self._host, self._placement, self.options, self._outside, replicas)
        self._landing = Landing(module, self._execution.receive) if module is not None and waits else None
        self._execution.landing = self._landing
        self._grow()

    # -- for users ----------------------------------------------------------------------------------------------

    def step(
        self,
        *,
        inputs: Inputs | None = None,
        loss: LossScale | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        """Update all parameters that have a gradient.

        Args:
            inputs: The inputs of a rule beside the gradients, which are not supported here.
            loss: How the loss was scaled, and whether the step is to be left out.
            max_grad_norm: Clip the gradients' global norm to this; default: the optimizer's ``max_grad_norm``.

        Raises:
            RuntimeError: A gradient is sparse or of another type than its weight, or an earlier job has failed.
            ValueError: There is clipping or a loss scale with ``clip="none"``, or there are inputs.
        """
        if inputs is not None:
            raise ValueError(
                f"detached: the rule needs {', '.join(map(repr, inputs))} beside the gradients, which detached steps "
                "do not have; valid: steps where the weights are, such as strategy='in_graph'"
            )
        with torch.inference_mode(False), torch.no_grad():
            self._step(loss, max_grad_norm)

    def publish(self) -> None:
        """Wait for an update that was delayed or is on its way, so that the weights are those after it."""
        if self._landing is not None:
            self._landing.finish()
        self._execution.publish()

    def await_uncalled(self) -> None:
        """With ``wait="forward"``, call this before a forward pass that does not begin with a call of the module."""
        if self._landing is not None:
            self._landing.before_all()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, on the device and on the host.

        ``optimizer.zero_grad()`` and ``module.zero_grad()`` do not drop gradients that have left for the host in the
        last backward pass of a window. (While :attr:`last` is False, gradients that leave have stand-ins, by which
        these calls drop them as well.)

        Args:
            set_to_none: If False, gradients that are still on the device become zeros.
        """
        self._execution.finish()
        self._intake.forget()
        job = self._host.submit(self._host.forget, self._placement.buckets)
        landing = self._landing is not None and self._landing.is_pending
        if not self._execution.is_under_way and not landing:
            job.result()
        else:  # an update still reads them: the next gradients wait
            for bucket in self._placement.buckets:
                bucket.arrivals = [job]
        Optimizer.zero_grad(self.optimizer, set_to_none)

    def masters(self) -> dict[Tensor, Tensor]:
        """The masters that this process has, by parameter.

        They are those of the last step; with ``clip="none"``, some are ahead between a backward pass and its step.
        """
        self.publish()
        self._grow()
        self._settle()
        return {
            place.param: master
            for bucket in self._placement.buckets
            for place, master in zip(bucket.places, bucket.masters, strict=False)
        }

    @contextmanager
    def masters_in_place(self) -> Iterator[None]:
        """A context in which the optimizer has the masters in place of its parameters, for loading a state."""
        with masters_in_place(self.optimizer, self.masters()):
            yield
        self._placement.bring_state(self.optimizer, self._placement.buckets)
        self._outside.note_state(self.optimizer)

    @torch.no_grad()
    def set_masters(self, values: Mapping[Tensor, Tensor]) -> list[Tensor]:
        """Give masters more bits than the weights have.

        Args:
            values: The masters' values by parameter, as a whole or this process's part. Values of parameters that
                require no gradients yet are kept until they do.

        Returns:
            The parameters whose weights are not what these values round to; their masters are left alone.
        """
        masters = self.masters()
        if (optimizer := self._optimizer()) is not None:
            frozen = (p for group in optimizer.param_groups for p in group["params"] if not p.requires_grad)
            self._awaited |= {p: values[p] for p in frozen if p in values and p not in masters}
        return self._set(masters, values)

    @staticmethod
    def _set(masters: Mapping[Tensor, Tensor], values: Mapping[Tensor, Tensor]) -> list[Tensor]:
        strange = []
        for p, master in masters.items():
            value = values.get(p)
            if value is None:
                continue
            mine = part_of(value, master).to(local(master))
            if mine.shape != local(p).shape or not torch.equal(mine.to(p.dtype), local(p).to(mine.device)):
                strange.append(p)
            else:
                local(master).copy_(mine)
        return strange

    @torch.no_grad()
    def read_weights(self) -> None:
        """Set masters to weights that were set from outside; masters that round to their weights keep their bits."""
        self.masters()
        for bucket in self._placement.buckets:
            bucket.follow(range(len(bucket.places)))
            self._outside.note(bucket.params)

    def report(self, *, scaled: bool = False) -> list[Decision]:
        """Which engine steps which parameters, and why."""
        notes = [self.options.described(), *([] if self._overlap else ["gradients stay on the device until the step"])]
        return self._placement.report(self.optimizer, scaled=scaled, notes=notes)

    def close(self) -> None:
        """Wait for all that is under way, remove the hooks, and end the thread."""
        self._intake.close()
        self._intake.forget()
        if self._landing is not None:
            self._landing.close()
        try:
            if not self.closed:
                self.publish()
                self._settle()
        finally:
            self._host.close()
            self._placement.close()

    @property
    def closed(self) -> bool:
        """Whether it takes no more steps."""
        return self._host.closed

    @property
    def last(self) -> bool:
        """Whether the backward pass to come is the window's last, after which a step comes."""
        return self._intake.last

    @last.setter
    def last(self, last: bool) -> None:
        self._intake.last = last

    @property
    def buckets(self) -> Sequence[OffloadBucket]:
        """The buckets in which the parameters travel."""
        return self._placement.buckets

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer; it is not kept alive."""
        if (optimizer := self._optimizer()) is None:
            raise RuntimeError("detached: the optimizer no longer exists")
        return optimizer

    # -- a step -------------------------------------------------------------------------------------------------

    def _step(self, loss: LossScale | None, max_grad_norm: float | None) -> None:
        optimizer = self.optimizer
        max_norm = self._placement.max_grad_norm(optimizer) if max_grad_norm is None else max_grad_norm
        self.options.check_step(max_norm, loss)
        if isinstance(optimizer, RuleOptimizer):
            optimizer.asked_for(None)  # refuses steps that would go wrong
        self._host.threads = torch.get_num_threads()
        self.publish()
        self._grow()
        self._follow()
        transport = self._placement.transport
        # Not if the next forward pass waits for the weights: it needs those first that were updated last.
        if self.options.clip != "exact" and max_norm is None and loss is None and self._landing is None:
            self._host.send_early(self._placement.buckets, GroupOptions(optimizer), transport, transport.fence())
        self._intake.collect()
        self._intake.measures = needs_squares(max_norm, loss)
        work = [bucket for bucket in self._placement.buckets if bucket.mine and bucket.present]
        if not work and not (self.replicas is not None and self._placement.has_gradients()):
            self._end_window(None)
            return
        squares = self._total(work) if self._intake.measures else None
        scaling = scaling_on_host(max_norm, loss, squares)
        self._end_window(scaling)
        if scaling is not None and scaling.skip():
            if loss is not None:
                loss.found_inf.fill_(1.0)
            self._host.submit(self._host.leave_out, work).result()
            return
        self._execution.do(optimizer, work, scaling)

    def _grow(self) -> None:
        """Take in the parameters that require gradients and are new, and follow those that have changed places."""
        optimizer = self._optimizer()
        if optimizer is None or self._host.closed or self._placement.is_current(optimizer):
            return
        with torch.inference_mode(False), torch.no_grad():
            for bucket, places in self._placement.moved(optimizer):
                self._host.submit(self._host.take_back, [bucket]).result()  # early updates used other groups' options
                self._intake.unwatch([p for p, place in zip(bucket.params, places, strict=True) if place is None])
                self._placement.rearrange(optimizer, bucket, places)
            made = self._placement.grow(optimizer)
            self._placement.bring_state(optimizer, made)
            for bucket in made:
                self._outside.note(bucket.params)
                found = dict(zip(bucket.params, bucket.masters, strict=False))
                self._set(found, self._awaited)
                self._awaited = {p: value for p, value in self._awaited.items() if p not in found}
            self._placement.admit(made)
            for bucket in self._placement.buckets:
                self._intake.watch(bucket)
            self._placement.note(optimizer)

    def _early_update(self, bucket: OffloadBucket) -> Callable[[], None] | None:
        """An update before the step, as if nothing was to be clipped; None if there are changes from outside."""
        optimizer = self.optimizer
        if self.options.clip == "exact" or self._outside.changed(bucket) or self._outside.loaded(optimizer):
            return None
        if not self._placement.is_current(optimizer):
            return None
        scale, max_norm = self.expects
        max_norm = self._placement.max_grad_norm(self.optimizer) if max_norm is None else max_norm
        number = 1.0 / scale if scale is not None else (1.0 if max_norm is not None else None)
        return partial(self._host.update_early, bucket, number, GroupOptions(self.optimizer))

    def _follow(self) -> None:
        """Set masters to weights that were changed since the last step, by averaging or clamping, say.

        A state that was loaded is converted to one for the masters.
        """
        loaded = self._outside.loaded(self.optimizer)
        changed = [bucket for bucket in self._placement.buckets if self._outside.changed(bucket)]
        if not (loaded or changed):
            return
        # Early updates were made without knowing of this.
        self._host.submit(self._host.take_back, self._placement.buckets if loaded else changed).result()
        if loaded:
            self._placement.bring_state(self.optimizer, self._placement.buckets)
            self._outside.note_state(self.optimizer)
        for bucket in changed:
            bucket.follow(self._outside.changed(bucket))
            self._outside.note(bucket.params)

    def _total(self, work: list[OffloadBucket]) -> Tensor:
        """The sum of squares of all gradients, added in the order of the buckets."""
        unknown = [bucket for bucket in work if bucket.squares is None]
        self._host.submit(self._host.measure, [bucket for bucket in unknown if not bucket.on_device]).result()
        here, place = [bucket for bucket in unknown if bucket.on_device], self._placement.transport.place()
        self._host.submit(self._host.measure, here, place).result()
        total = summed_squares(work)
        if self.replicas is not None and self._placement.whole is None:
            total = self.replicas.sum(total)
        return total.reshape(1)

    def _end_window(self, scaling: Scaling | None) -> None:
        self.scaling = scaling
        if isinstance(optimizer := self.optimizer, RuleOptimizer):
            optimizer._stepper.scaling = scaling  # the optimizer's `grad_norm` reads it
        self._intake.end_window()

    def _settle(self) -> None:
        """Undo updates that were made in a backward pass whose step has not come yet."""
        if self.options.clip == "speculative" and not self._host.closed:
            self._host.submit(self._host.take_back, self._placement.buckets).result()
