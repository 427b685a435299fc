"""Parameters that travel together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_optim.offload.arena import Slab
from lightning_optim.offload.masters import GroupOptions, View, like_master, master_of
from lightning_optim.offload.transport import Ticket
from lightning_optim.optimizers.shards import LocalSquares, local
from lightning_optim.optimizers.stepper import Stepper
from lightning_optim.optimizers.undo import UndoBuffers


@dataclass(frozen=True)
class Place:
    """A parameter of an optimizer.

    Attributes:
        param: The parameter.
        row: Its param group.
        index: Its place in the group.
        number: Its place among all parameters.
    """

    param: Tensor
    row: int
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
    """Parameters whose gradients arrive, are used and leave as weights together.

    Attributes:
        label: For messages and records.
        places: The parameters.
        rank: The process that has their masters, if these are divided over processes; else None.
        mine: Whether this process has the masters.
        on_device: Whether masters and state are on the weights' device.
        widens: Whether masters have more bits than their weights.
        masters: One for each parameter; none if this process does not have them.
        staging: Where gradients arrive, in their own type.
        outgoing: Where new weights are written in their own type; None if the masters themselves are of that type.
        sums: Gradients of several arrivals, in the masters' type; made when first needed.
        view: The optimizer as if it had only these masters.
        stepper: What steps them; None if the optimizer's own step does.
        undo: Where old values are kept.

        staged: The parameters whose gradients are in :attr:`staging`, and not in :attr:`sums`.
        summed: The parameters whose gradients are in :attr:`sums`.
        since: The parameters whose gradients were added to since the last shipment.
        fired: How often each gradient was added to in the last backward pass of this window.
        usual: The same, of windows before.
        arrivals: Jobs that wait for gradients.
        squares: The sums of squares of its gradients, if they are known.
        early: The update that was done before the step, if it was.
        unsent: The parameters whose new weights have not left for the device.
        under_way: Those whose new weights have left, and are perhaps not there yet.
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

    staged: set[int] = field(default_factory=set)
    summed: set[int] = field(default_factory=set)
    since: set[int] = field(default_factory=set)
    fired: Counter[int] = field(default_factory=Counter)
    usual: Counter[int] | None = None
    arrivals: list[Future[None]] = field(default_factory=list)
    squares: LocalSquares | None = None
    early: Early | None = None
    unsent: set[int] = field(default_factory=set)
    under_way: list[int] = field(default_factory=list)
    sent: Ticket = field(default_factory=Ticket)

    @property
    def params(self) -> list[Tensor]:
        """The parameters."""
        return [place.param for place in self.places]

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
            assert grad is not None  # noqa: S101 # by `present`
            return grad
        assert self.sums is not None or index in self.staged  # noqa: S101
        value = self.sums[index] if self.sums is not None and index in self.summed else self.staging[index]
        return like_master(value, self.masters[index])

    def copies(self) -> dict[Tensor, Tensor] | None:
        """Where a step writes the new weights too."""
        if self.outgoing is None:
            return None
        pairs = zip(self.masters, self.outgoing, strict=True)
        return {master: like_master(out, master) for master, out in pairs}

    def ships(self) -> list[Tensor]:
        """The new weights, in the type of the weights: what this process has of them."""
        return [local(master) for master in self.masters] if self.outgoing is None else self.outgoing

    def forget_gradients(self) -> None:
        """What the host has of them."""
        self.staged, self.summed = set(), set()
        self.squares = None

    def follow(self, indices: Iterable[int]) -> None:
        """Have masters be their weights, where these are not what they round to."""
        for index in indices if self.mine else ():
            p, master = local(self.places[index].param), local(self.masters[index])
            weight = p.to(master.device)
            if not torch.equal(master.to(p.dtype), weight):
                master.copy_(weight)
            self.unsent.discard(index)

    def allocate_sums(self) -> list[Tensor]:
        """Memory for the sums."""
        if self.sums is None:
            parts = [local(master) for master in self.masters]
            self.sums = Slab(parts[0].dtype, parts, pinned=False).tensors
        return self.sums


def divide(places: Sequence[Place], bucket_bytes: int) -> list[list[Place]]:
    """Cut parameters into runs of one type and device, each of at most ``bucket_bytes`` or of one parameter.

    Args:
        places: In the order in which their gradients are expected.
        bucket_bytes: Of gradients.
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
        buckets: Those of one device, whose masters this process has in host memory.
        master_dtype: Of the masters of real weights.
        pinned: Whether what travels is to be in pinned memory.
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
            bucket.outgoing = None if outgoing is None else [next(outgoing) for _ in bucket.places]


def widened(dtype: torch.dtype, master_dtype: torch.dtype) -> torch.dtype:
    """The type of a master: at least that of the weight."""
    real = torch.promote_types(dtype.to_real(), master_dtype)
    return real.to_complex() if dtype.is_complex else real
