"""Which parameters travel together, where their masters are, and what steps them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.adopt import stepper_for, why_not_adopted
from lightning_optim.engines.base import Decision
from lightning_optim.engines.memory import is_dense, is_lazy
from lightning_optim.offload.buckets import OffloadBucket, Place, divide, lay_out, widened
from lightning_optim.offload.masters import View, bring_state, master_of
from lightning_optim.offload.options import DetachedOptions
from lightning_optim.offload.replicas import Replicas
from lightning_optim.offload.shared_memory import check_memory
from lightning_optim.offload.transport import Transport
from lightning_optim.offload.transports import transport_for
from lightning_optim.offload.whole import Whole, has_own_step
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.stepping.evaluation import EvaluatesElsewhere
from lightning_optim.stepping.evaluations import request_of
from lightning_optim.stepping.shards import local
from lightning_optim.stepping.stepper import Stepper
from lightning_optim.stepping.together import why_one_whole


class Placement:
    """The buckets of an optimizer's parameters.

    Args:
        optimizer: The optimizer; not kept alive.
        options: The options of detached steps.
        transport: The transport between device and host; None: chosen by the kind of device.
        replicas: The processes that divide masters and state among them.

    Attributes:
        buckets: The buckets, in the order in which their gradients are expected: the last layers first.
        whole: What steps all masters at once, if the optimizer needs that; None: our engines step bucket by bucket.

    Raises:
        ValueError: The optimizer cannot be stepped with these options.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        options: DetachedOptions,
        transport: Transport | None,
        replicas: Replicas | None,
    ) -> None:
        self.buckets: list[OffloadBucket] = []
        reason = _why_whole(optimizer)
        self.whole = None if reason is None else Whole(optimizer, reason, options.engine)
        self._options = options
        self._replicas = replicas
        self._transport = transport
        self._device: torch.device | None = None
        self._seen: tuple[Any, ...] = ()
        name = type(optimizer).__name__
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"detached: {name}, whose step evaluates the model, at weights that only the device has; valid: any "
                "optimizer that steps without a closure"
            )
        if request_of(optimizer) == "hessian_vector":
            raise ValueError(
                f"detached: {name}, whose step needs second derivatives beside gradients, and none travel to the "
                "masters in host memory; valid: strategy='in_graph' or 'in_graph_ddp', or another optimizer"
            )
        if isinstance(optimizer, EvaluatesElsewhere):
            _check_evaluation(name, options, replicas)
        if self.whole is not None:
            for option, value, valid in (
                ("clip", options.clip, "exact"),
                ("device_fraction", options.device_fraction, 0.0),
                ("delay_one_step", options.delay_one_step, False),  # during the step, param groups hold the masters
                ("wait", options.wait, "step"),  # for the same reason
            ):
                if value != valid:
                    raise ValueError(
                        f"{option}={value!r} with {name}, which {self.whole.words}; valid: {option}={valid!r}"
                    )
        elif options.clip == "speculative" and isinstance(optimizer, RuleOptimizer):
            if type(optimizer._stepper) is not Stepper:
                raise ValueError(f"clip='speculative' with {name}, whose step cannot be taken back; valid: exact, none")
            state_dtype = optimizer.options.state_dtype
            if state_dtype is not None and torch.promote_types(state_dtype, options.dtype) != options.dtype:
                # The kernel computes in the masters' type, and so saves no more of a slot than that.
                raise ValueError(
                    f"clip='speculative' with state_dtype={state_dtype} and master_dtype={options.dtype}: the state "
                    "has more bits than a step could put back; valid: master_dtype='float64', or clip='exact'"
                )

    @property
    def transport(self) -> Transport:
        """The transport between device and host."""
        if self._transport is None:
            self._transport = transport_for(self._device or torch.device("cpu"))
        return self._transport

    def is_current(self, optimizer: Optimizer) -> bool:
        """Whether the param groups, and which parameters require gradients, are as when :meth:`note` was called."""
        return self._seen == _arrangement(optimizer)

    def note(self, optimizer: Optimizer) -> None:
        """Note that the buckets are those of the present param groups."""
        self._seen = _arrangement(optimizer)

    def moved(self, optimizer: Optimizer) -> list[tuple[OffloadBucket, list[Place | None]]]:
        """The buckets with parameters that have left the param groups or moved in them, and all their places now."""
        places = {place.param: place for place in _places(optimizer)}
        now = [(bucket, [places.get(p) for p in bucket.params]) for bucket in self.buckets]
        return [(bucket, found) for bucket, found in now if found != bucket.places]

    def rearrange(self, optimizer: Optimizer, bucket: OffloadBucket, places: list[Place | None]) -> None:
        """Update a bucket to its parameters' places, and drop parameters that are no longer the optimizer's."""
        changes = bucket.moved(places)
        if not changes["places"]:
            self.buckets = [other for other in self.buckets if other is not bucket]
            return
        if bucket.mine and self.whole is None:
            changes |= self._equipment(optimizer, changes["places"], changes["masters"])
        bucket.__dict__.update(changes)  # at once: whatever breaks off, all of these have changed or none

    def grow(self, optimizer: Optimizer) -> list[OffloadBucket]:
        """Make buckets of the parameters that require gradients and are in none yet. :meth:`admit` takes them in.

        Raises:
            ValueError: The weights are on several devices.
        """
        places = _places(optimizer)
        known = {p for bucket in self.buckets for p in bucket.params}
        new = [place for place in places if place.param.requires_grad and place.param not in known]
        if not new:
            return []
        self._check_devices(new)
        known |= {place.param for place in new}
        check_memory([local(place.param) for place in places if place.param in known])
        new.reverse()  # the order of a backward pass
        limit = self._options.bucket_mb * 1e6
        if self._replicas is not None:
            # Small enough that every process gets its share.
            limit = min(limit, max(1.0, sum(place.param.nbytes for place in new) / self._replicas.world))
        made = [
            OffloadBucket(f"bucket {number}", run)
            for number, run in enumerate(divide(new, int(limit)), start=len(self.buckets))
        ]
        for bucket in made:
            dtype = bucket.params[0].dtype
            bucket.widens = widened(dtype, self._options.dtype) != dtype
        self._keep_on_device(made)
        if self._replicas is not None and self.whole is None:
            self._replicas.assign(made)
        pinned = self.transport.pins
        lay_out([b for b in made if b.mine and not b.on_device], self._options.dtype, pinned=pinned)
        for bucket in made:
            if bucket.mine and bucket.on_device:
                _stay(bucket, self._options.dtype)
            if bucket.mine and self.whole is None:
                bucket.__dict__.update(self._equipment(optimizer, bucket.places, bucket.masters))
        return made

    def admit(self, made: Sequence[OffloadBucket]) -> None:
        """Add new buckets."""
        self.buckets += made

    def bring_state(self, optimizer: Optimizer, buckets: Sequence[OffloadBucket]) -> None:
        """Convert the state of these buckets' weights to one for their masters."""
        for bucket in buckets:
            masters = dict(zip(bucket.params, bucket.masters, strict=False))  # other processes have the others

            def dtype_of(p: Tensor, slot: str, bucket: OffloadBucket = bucket, masters: Any = masters) -> torch.dtype:
                stepper = bucket.stepper if self.whole is None else self.whole.stepper
                if stepper is None:
                    return masters[p].dtype
                number = next(place.group_number for place in bucket.places if place.param is p)
                return stepper.planner_of(optimizer.param_groups[number], p).slot_dtype(masters[p], slot)

            bring_state(optimizer, masters, dtype_of)

    def max_grad_norm(self, optimizer: Optimizer) -> float | None:
        """The optimizer's own limit of the gradients' norm."""
        return optimizer.options.max_grad_norm if isinstance(optimizer, RuleOptimizer) else None

    def has_gradients(self) -> bool:
        """Whether any parameter has a gradient in its place."""
        return any(p.grad is not None for bucket in self.buckets for p in bucket.params)

    def report(self, optimizer: Optimizer, *, scaled: bool, notes: Sequence[str]) -> list[Decision]:
        """Which engine steps which parameters, and why."""
        told = "; ".join(notes)
        if self.whole is not None:
            count = sum(len(bucket.places) for bucket in self.buckets)
            masters = {p: master for b in self.buckets for p, master in zip(b.params, b.masters, strict=True)}
            return self.whole.report(optimizer, masters, f"{count} tensors in host memory, {told}", scaled=scaled)
        same: dict[tuple[str, str, str], list[tuple[OffloadBucket, Decision]]] = {}
        for bucket in self.buckets:
            for decision in bucket.stepper.report(scaled=scaled) if bucket.stepper is not None else ():
                types = decision.bucket.partition(" (")[2]
                place = "on the device" if bucket.on_device else f"in host memory, {told}"
                same.setdefault((place, types, str(replace(decision, bucket=""))), []).append((bucket, decision))
        combined = []
        for (place, types, _), pairs in same.items():
            count = len({bucket.label for bucket, _ in pairs})
            combined.append(replace(pairs[0][1], bucket=f"tensors of {count} buckets ({types} {place}"))
        return combined

    def close(self) -> None:
        """Close the transport."""
        if self._transport is not None:
            self._transport.close()

    def _check_devices(self, places: Sequence[Place]) -> None:
        devices = {local(place.param).device for place in places} | ({self._device} if self._device else set())
        if len(devices) > 1:
            raise ValueError(
                f"detached steps of weights on {', '.join(sorted(map(str, devices)))}; valid: one device for each "
                "process"
            )
        self._device = devices.pop()

    def _keep_on_device(self, made: list[OffloadBucket]) -> None:
        """Leave the buckets that come last on the device, up to the share that was asked for."""
        if not self._options.device_fraction:
            return  # so that buckets of empty parameters, for which there always is room, do not stay either
        total = sum(p.numel() for bucket in made for p in bucket.params)
        room = self._options.device_fraction * total
        for bucket in reversed(made):
            if not all(_writable(local(p)) for p in bucket.params):
                continue
            room -= sum(p.numel() for p in bucket.params)
            if room < 0:
                break
            bucket.on_device = True

    def _equipment(self, optimizer: Optimizer, places: Sequence[Place], masters: Sequence[Tensor]) -> dict[str, Any]:
        """The view and the stepper by which the masters of a bucket are stepped as the optimizer would step them."""
        where = [(place.group_number, place.index) for place in places]
        view = View(optimizer, where, masters, [place.param for place in places])
        if isinstance(optimizer, RuleOptimizer):
            engine = optimizer.options.engine if self._options.engine == "auto" else self._options.engine
            options = replace(optimizer.options, engine=engine, max_grad_norm=None, capture=False)
            stepper = optimizer.make_stepper(view, options)
        else:
            stepper = stepper_for(optimizer, engine=self._options.engine, owner=view)
        # Rounding noise depends on a parameter's number, whatever bucket it is in.
        groups = list(dict.fromkeys(group_number for group_number, _ in where))
        order = sorted(range(len(places)), key=lambda i: (groups.index(where[i][0]), i))
        stepper.number_parameters([places[i].number for i in order])
        return {"view": view, "stepper": stepper}


def _places(optimizer: Optimizer) -> list[Place]:
    """The places of all parameters in the param groups."""
    groups = enumerate(optimizer.param_groups)
    where = [(p, group_number, index) for group_number, group in groups for index, p in enumerate(group["params"])]
    return [Place(*place, number) for number, place in enumerate(where)]


def _arrangement(optimizer: Optimizer) -> tuple[Any, ...]:
    """The parameters of each group, and which require gradients: cheaper to compare than :func:`_places`."""
    groups = [group["params"] for group in optimizer.param_groups]
    return [list(map(id, params)) for params in groups], [p.requires_grad for params in groups for p in params]


def _writable(p: Tensor) -> bool:
    """Whether a step on the device can write a weight, whose memory it writes directly."""
    return is_dense(p) and not is_lazy(p)


def _stay(bucket: OffloadBucket, master_dtype: torch.dtype) -> None:
    """Give a bucket its masters on the device: the weights themselves, if these have the masters' type."""
    dtype = widened(bucket.params[0].dtype, master_dtype)
    if dtype == bucket.params[0].dtype:
        bucket.masters = bucket.params
        return
    storage = [torch.empty_like(local(p).detach(), dtype=dtype) for p in bucket.params]
    bucket.masters = [master_of(p, s) for p, s in zip(bucket.params, storage, strict=True)]
    bucket.outgoing = [local(p).detach() for p in bucket.params]  # see `OffloadBucket.aim`


def _check_evaluation(name: str, options: DetachedOptions, replicas: Replicas | None) -> None:
    """Check that an optimizer can exchange the weights for those of evaluation between two steps."""
    why = "its eval() computes other weights from these and its state"
    if replicas is not None:
        raise ValueError(
            f"detached: {name} with replicated weights: {why}, and each process has but a part of the state; valid: "
            "strategy='in_graph_ddp', 'detached_fsdp2', or 'detached' with one process"
        )
    for option, value, valid in (("delay_one_step", options.delay_one_step, False), ("wait", options.wait, "step")):
        if value != valid:
            raise ValueError(
                f"{option}={value!r} with {name}: {why}, which must not be on their way; valid: {option}={valid!r}"
            )


def _why_whole(optimizer: Optimizer) -> str | None:
    if isinstance(optimizer, RuleOptimizer):
        if has_own_step(optimizer):
            return "its class has a step of its own"
        return why_one_whole(type(optimizer), optimizer.param_groups)
    return why_not_adopted(optimizer)
