"""Buckets: parameters whose gradients and weights travel together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.memory import is_dense, is_lazy
from lightning_optim.offload.arena import Slab
from lightning_optim.offload.away import Away, Kept
from lightning_optim.offload.masters import GroupOptions, View, like_master, master_of
from lightning_optim.offload.transport import Ticket
from lightning_optim.offload.worker import Job
from lightning_optim.stepping.shards import LocalSquares, local
from lightning_optim.stepping.stepper import Stepper
from lightning_optim.stepping.undo import UndoBuffers


@dataclass(frozen=True)
class Place:
    """A parameter of an optimizer, and its place in the param groups.

    Attributes:
        param: The parameter.
        group_number: The number of its param group.
        index: Its place in the group.
        number: Its place among all parameters.
    """

    param: Tensor
    group_number: int
    index: int
    number: int


@dataclass
class Early:
    """An update that was done before the step.

    Attributes:
        options: The options of the param groups that it was done with.
        factor: What the gradients were multiplied by.
        members: The parameters that it was for.
        sent: Whether the new weights have left.
    """

    options: GroupOptions
    factor: float | None
    members: frozenset[int]
    sent: bool = field(default=False, compare=False)


@dataclass(eq=False)
class OffloadBucket:
    """Parameters whose gradients arrive and are used together, and whose new weights leave together.

    Attributes:
        label: The bucket's name, for messages and records.
        places: The parameters.
        rank: The process that has their masters, if these are divided over processes; else None.
        mine: Whether this process has the masters.
        on_device: Whether masters and state are on the weights' device.
        widens: Whether masters have more bits than their weights.
        masters: One for each parameter; none if this process does not have them.
        staging: Where gradients arrive, in their own type.
        outgoing: Where new weights are written in their own type; None if the masters themselves are of that type.
        sums: Gradients of several arrivals, in the masters' type; made when first needed.
        view: A view of the optimizer that has only these masters.
        stepper: What steps the masters; None if the optimizer's own step does.
        undo: Buffers for the old values of an update that may be undone.
        watched: Whether hooks take the gradients.
        number_of: The index in this bucket of each parameter. (The sets and dicts below hold such indices.)

        staged: The parameters whose gradients are in :attr:`staging`, and not in :attr:`sums`.
        summed: The parameters whose gradients are in :attr:`sums`.
        since: The parameters whose gradients were added to since the last shipment.
        fired: How often each gradient was added to in the last backward pass of this window.
        usual: The same, for earlier windows.
        arrivals: Jobs that wait for gradients.
        fetched: The last copy of gradients to the host.
        leaving: The gradients that are being copied to the host, and are still in their places.
        away: The stand-ins for gradients that have left, while more is to be added to them.
        dropped: The parameters whose gradients on the host are no longer wanted.
        planned: The options with which the next update is planned.
        stepped: The options with which the last update was done.
        squares: The sums of squares of its gradients, if they are known.
        early: The update that was done before the step, if there was one.
        unsent: The parameters whose new weights have not left for the device.
        under_way: The parameters whose new weights have left, and are perhaps not there yet.
        sent: The last copy of weights to the device.
    """

    label: str
    places: list[Place]
    rank: int | None = None
    mine: bool = True
    on_device: bool = False
    widens: bool = False
    masters: list[Tensor] = field(default_factory=list)
    staging: list[Tensor] = field(default_factory=list)
    outgoing: list[Tensor] | None = None
    sums: list[Tensor] | None = None
    view: View | None = None
    stepper: Stepper | None = None
    undo: UndoBuffers = field(default_factory=UndoBuffers)
    watched: bool = False
    number_of: dict[Tensor, int] = field(init=False)

    staged: set[int] = field(default_factory=set)
    summed: set[int] = field(default_factory=set)
    since: set[int] = field(default_factory=set)
    fired: Counter[int] = field(default_factory=Counter)
    usual: Counter[int] | None = None
    arrivals: list[Job] = field(default_factory=list)
    fetched: Ticket = field(default_factory=Ticket)
    leaving: dict[int, Tensor] = field(default_factory=dict)
    away: dict[int, Away] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)
    planned: GroupOptions | None = None
    stepped: GroupOptions | None = None
    squares: LocalSquares | None = None
    early: Early | None = None
    unsent: set[int] = field(default_factory=set)
    under_way: list[int] = field(default_factory=list)
    sent: Ticket = field(default_factory=Ticket)

    def __post_init__(self) -> None:
        """Number the parameters."""
        self.number_of = {place.param: i for i, place in enumerate(self.places)}

    @property
    def params(self) -> list[Tensor]:
        """The parameters."""
        return list(self.number_of)

    @property
    def present(self) -> frozenset[int]:
        """The parameters that have a gradient."""
        if self.on_device:
            return frozenset(i for i, p in enumerate(self.params) if p.grad is not None)
        return frozenset(self.staged | self.summed)

    def gradient(self, index: int) -> Tensor:
        """The gradient of a parameter that has one, divided as its master is."""
        if self.on_device:
            grad = self.places[index].param.grad
            assert grad is not None  # noqa: S101 # `present` has checked
            return grad
        assert self.sums is not None or index in self.staged  # noqa: S101
        value = self.sums[index] if self.sums is not None and index in self.summed else self.staging[index]
        return like_master(value, self.masters[index])

    def away_of(self, p: Tensor) -> Kept | None:
        """The gradient of a parameter, if it has left and is still wanted."""
        index = self.number_of.get(p)
        found = None if index is None or index in self.dropped else self.away.get(index)
        return None if found is None else found.kept

    def copies(self) -> dict[Tensor, Tensor] | None:
        """For each master, the memory where a step also writes the new weight; None if masters are sent themselves."""
        if self.outgoing is None:
            return None
        pairs = zip(self.masters, self.outgoing, strict=True)
        return {master: like_master(out, master) for master, out in pairs}

    def ships(self) -> list[Tensor]:
        """This process's part of the new weights, in the weights' own type."""
        return [local(master) for master in self.masters] if self.outgoing is None else self.outgoing

    def aim(self) -> None:
        """Before a step on the device, find the memory that the weights have now, where the step is to write.

        Raises:
            RuntimeError: The step cannot write there.
        """
        if not (self.on_device and self.outgoing is not None):
            return
        weights = [local(p).detach() for p in self.params]
        for p in weights:
            if is_lazy(p) or not is_dense(p):
                raise RuntimeError(
                    f"detached: a weight of shape {tuple(p.shape)} has been given memory with gaps, or of its negative "
                    "or conjugate, since it was taken over; valid: what it had then"
                )
        self.outgoing = weights

    def discard(self) -> None:
        """Forget the gradients that were dropped."""
        dropped, self.dropped = self.dropped, set()
        if dropped:
            self.staged -= dropped
            self.summed -= dropped
            self.squares = None

    def forget_gradients(self) -> None:
        """Forget what the host has of the gradients."""
        self.staged, self.summed = set(), set()
        self.squares = None

    def moved(self, places: Sequence[Place | None]) -> dict[str, Any]:
        """The attributes to change after parameters have moved: those that stay keep their masters and gradients.

        Args:
            places: The present place of each parameter; None if it has left the optimizer.
        """
        kept = [i for i, place in enumerate(places) if place is not None]
        number = {old: new for new, old in enumerate(kept)}
        lists = ("masters", "staging", "outgoing", "sums")
        sets = ("staged", "summed", "since", "unsent", "dropped")
        left: dict[str, Any] = {
            name: [values[i] for i in kept] if (values := getattr(self, name)) else values for name in lists
        }
        left |= {name: {number[i] for i in getattr(self, name) if i in number} for name in sets}
        for name in ("leaving", "away"):
            left[name] = {number[i]: value for i, value in getattr(self, name).items() if i in number}
        for name in ("fired", "usual"):
            counts = getattr(self, name)
            left[name] = counts and Counter({number[i]: n for i, n in counts.items() if i in number})
        left["places"] = [place for place in places if place is not None]
        left["number_of"] = {place.param: i for i, place in enumerate(left["places"])}
        left["under_way"] = [number[i] for i in self.under_way if i in number]
        return left | {"squares": None, "planned": None}

    def follow(self, indices: Iterable[int]) -> None:
        """Set masters to their weights, except those that round to their weights already."""
        for index in indices if self.mine else ():
            p, master = local(self.places[index].param), local(self.masters[index])
            weight = p.to(master.device)
            if not torch.equal(master.to(p.dtype), weight):
                master.copy_(weight)
            self.unsent.discard(index)

    def allocate_sums(self) -> list[Tensor]:
        """The sums, whose memory is allocated at the first call."""
        if self.sums is None:
            parts = [local(master) for master in self.masters]
            self.sums = Slab(parts[0].dtype, parts, pinned=False).tensors
        return self.sums


def divide(places: Sequence[Place], bucket_bytes: int) -> list[list[Place]]:
    """Cut parameters into runs of one type and device, each of at most ``bucket_bytes`` or of one parameter.

    Args:
        places: The parameters, in the order in which their gradients are expected.
        bucket_bytes: Bytes of gradients.
    """
    runs: list[list[Place]] = []
    size, kind = 0, None
    for place in places:
        p = local(place.param)
        same = kind == (p.dtype, p.device)
        if not runs or not same or size + p.nbytes > bucket_bytes:
            runs.append([])
            size, kind = 0, (p.dtype, p.device)
        runs[-1].append(place)
        size += p.nbytes
    return runs


def lay_out(buckets: Sequence[OffloadBucket], master_dtype: torch.dtype, *, pinned: bool) -> None:
    """Give buckets their memory: one slab for each kind and type.

    Args:
        buckets: Buckets of one device, whose masters this process has in host memory.
        master_dtype: The type of the masters of real weights.
        pinned: Whether memory from and to which copies are made is to be pinned.
    """
    by_dtype: dict[torch.dtype, list[OffloadBucket]] = {}
    for bucket in buckets:
        by_dtype.setdefault(bucket.places[0].param.dtype, []).append(bucket)
    for dtype, same in by_dtype.items():
        wide = widened(dtype, master_dtype)
        parts = [[local(p).detach() for p in bucket.params] for bucket in same]
        flat = [part for bucket_parts in parts for part in bucket_parts]
        masters = iter(Slab(wide, flat, pinned=pinned and wide == dtype).tensors)
        staging = iter(Slab(dtype, flat, pinned=pinned).tensors)
        outgoing = None if wide == dtype else iter(Slab(dtype, flat, pinned=pinned).tensors)
        for bucket in same:
            bucket.masters = [master_of(p, next(masters)) for p in bucket.params]
            bucket.staging = [next(staging) for _ in bucket.places]
            if outgoing is not None:
                bucket.outgoing = [next(outgoing).copy_(local(p).detach()) for p in bucket.params]


def widened(dtype: torch.dtype, master_dtype: torch.dtype) -> torch.dtype:
    """The type of a master, which is never narrower than the weight's."""
    real = torch.promote_types(dtype.to_real(), master_dtype)
    return real.to_complex() if dtype.is_complex else real
