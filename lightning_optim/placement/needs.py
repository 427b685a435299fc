"""What each placement of the optimizer's step needs of a machine: memory, by what it is for, and time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_optim.checks import NONNEGATIVE, check_choice, check_ranges, whole
from lightning_optim.placement.footprint import Footprint
from lightning_optim.placement.machine import Machine
from lightning_optim.placement.step_time import (
    BUCKET_BYTES,
    CLIP_MODES,
    SPECULATIVE_FACTOR,
    ClipMode,
    Stages,
)

#: Where the step runs: on the device, in its queue; or on the host, with masters and state in host memory.
Placement = Literal["in_graph", "detached"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)

#: How processes share the model: each has all of it (DDP), or its part of it (FSDP2).
Sharding = Literal["ddp", "fsdp2"]
SHARDINGS: tuple[Sharding, ...] = get_args(Sharding)

#: Share of free memory that a plan leaves alone, on the device and on the host. A choice, not a measurement: it is for
#: what nobody can count beforehand, the rounding of torch's allocator (to blocks of 2 MiB, or parts of 20 MiB ones),
#: workspaces of cuBLAS and NCCL, and on the host the data loader's processes. vLLM's
#: `gpu_memory_utilization=0.9` leaves as much for the same.
MARGIN = 0.10

#: Share of free device memory that is kept for activations if their size is not given. It is a choice, too, and small
#: on purpose: a plan that is too hopeful runs out of memory once and falls back to `detached`, which costs one step;
#: one that is too careful costs time at every step.
ACTIVATION_RESERVE = 0.10

_RANGES = {
    "ranks": whole(1),
    "local_ranks": whole(1).or_none(),
    "bucket_bytes": whole(1),
    "activation_bytes": NONNEGATIVE.or_none(),
    "backward_seconds": NONNEGATIVE.or_none(),
    "resident_bytes": NONNEGATIVE,
}


@dataclass(frozen=True)
class Conditions:
    """How the training is run.

    Attributes:
        ranks: Number of processes, one for each device.
        local_ranks: How many of them share one host; None: as many as it has devices.
        sharding: What the processes divide among themselves, see :data:`Sharding`.
        clips: Whether something other than the optimizer clips gradients by their global norm, or checks them for
            infinite values.
        accumulates: Whether a step is for several backward passes, whose gradients a detached step sums on the host.
        activation_bytes: Device memory of everything that is not weights, gradients or state, at its peak; None: not
            known.
        backward_seconds: Time of the backward pass behind which a detached step can hide; None: not known.
        resident_bytes: Bytes of weights and gradients that are on the device already, and so not in its free memory.
        bucket_bytes: Bytes of gradients that are moved at a time.

    Raises:
        ValueError: A value is out of its range.
    """

    ranks: int = 1
    local_ranks: int | None = None
    sharding: Sharding = "ddp"
    clips: bool = False
    accumulates: bool = False
    activation_bytes: int | None = None
    backward_seconds: float | None = None
    resident_bytes: int = 0
    bucket_bytes: int = BUCKET_BYTES

    def __post_init__(self) -> None:
        """Check the values."""
        check_choice("", "sharding", self.sharding, SHARDINGS)
        check_ranges("", self, _RANGES)
        if self.local_ranks is not None and self.local_ranks > self.ranks:
            raise ValueError(f"local_ranks={self.local_ranks} of ranks={self.ranks}; valid: 1 to {self.ranks}")

    def on_one_host(self, machine: Machine) -> int:
        """How many of the processes share a host like this one."""
        if self.local_ranks is not None:
            return self.local_ranks
        return self.ranks if machine.shares_memory else min(self.ranks, machine.devices)


@dataclass(frozen=True)
class Needs:
    """What one placement needs, for each process.

    Attributes:
        placement: The placement.
        device: Bytes of device memory, by what they are for.
        host: Bytes of host memory, by what they are for.
        device_room: Bytes of device memory that are available.
        host_room: Bytes of host memory that are available.
        shares_memory: Whether the device's memory is the host's.
        step_seconds: Estimated time of a step that nothing hides.
        exposed_seconds: For each possible clip mode, the estimated time that the backward pass does not hide. A step in
            graph has no modes, and none of it is hidden. None: the backward pass's time is not known.
        arithmetic: The calculation of the estimates, in words.
    """

    placement: Placement
    device: Mapping[str, int]
    host: Mapping[str, int]
    device_room: int
    host_room: int
    shares_memory: bool
    step_seconds: float
    exposed_seconds: Mapping[ClipMode, float] | None
    arithmetic: tuple[str, ...]

    @property
    def device_bytes(self) -> int:
        """All device memory that it needs."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All host memory that it needs."""
        return sum(self.host.values())

    @property
    def lacks(self) -> str | None:
        """Which memory is too small, with the numbers; None if it fits."""
        if self.shares_memory:
            # Device and host share one memory.
            needed = self.device_bytes + self.host_bytes
            both = {**self.device, **self.host}
            return None if needed <= self.host_room else _too_much("memory", both, needed, self.host_room)
        if self.device_bytes > self.device_room:
            return _too_much("device memory", self.device, self.device_bytes, self.device_room)
        if self.host_bytes > self.host_room:
            return _too_much("host memory", self.host, self.host_bytes, self.host_room)
        return None

    @property
    def fits(self) -> bool:
        """Whether there is enough memory."""
        return self.lacks is None


def needs(
    placement: Placement, footprint: Footprint, machine: Machine, conditions: Conditions, clip: ClipMode = "exact"
) -> Needs:
    """What a placement needs of a machine.

    Args:
        placement: The placement.
        footprint: The footprint of the training.
        machine: The machine to run it on.
        conditions: How the training is run.
        clip: How a detached step clips: ``"speculative"`` keeps masters and state twice.

    Raises:
        ValueError: There is no such placement.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement={placement!r}; valid: {', '.join(PLACEMENTS)}")
    local = conditions.on_one_host(machine)
    free_device = machine.device_free + conditions.resident_bytes
    free_host = machine.host_free + (conditions.resident_bytes * local if machine.shares_memory else 0)
    ranks = 1 if footprint.divided else conditions.ranks
    fsdp = conditions.sharding == "fsdp2"
    whole = ranks if fsdp else 1  # in how many parts weights and gradients are divided
    if not (fsdp or footprint.in_buckets):
        ranks = 1  # an optimizer's own step needs all masters
    device = {
        "weights": _part(footprint.weights, whole),
        "gradients": _part(footprint.gradients, whole),
    }
    if conditions.ranks > 1 and not fsdp:
        # `gradient_as_bucket_view`, which would save them, is off by default.
        device["DDP's gradient buckets"] = footprint.gradients
    if conditions.activation_bytes is None:
        device["a reserve for activations"] = int(ACTIVATION_RESERVE * free_device)
    else:
        device["activations"] = int(conditions.activation_bytes)
    host: dict[str, int] = {}
    if placement == "in_graph":
        device["state"] = _part(footprint.state.bytes, whole)
        device["the step's own"] = _part(footprint.workspace, whole)
        seconds, exposed, arithmetic = _in_graph_time(footprint, machine, conditions, whole, local)
    else:
        device["the step's own"] = _part(footprint.detached_workspace, whole)
        masters, state = _part(footprint.masters, ranks), _part(footprint.master_state.bytes, ranks)
        host = {
            "masters": masters,
            "state": state,
            "what undoes a step": masters + state if clip == "speculative" else 0,
            "pinned gradients": _part(_gradients(footprint), ranks),
            "pinned weights": _part(footprint.copies, ranks),
            "sums of gradients": masters if conditions.accumulates else 0,
        }
        seconds, exposed, arithmetic = _detached_time(footprint, machine, conditions, clip, ranks, local)
    return Needs(
        placement=placement,
        device={name: size for name, size in device.items() if size},
        host={name: size for name, size in host.items() if size},
        device_room=int(free_device * (1 - MARGIN)),
        host_room=int(free_host * (1 - MARGIN)) // local,
        shares_memory=machine.shares_memory,
        step_seconds=seconds,
        exposed_seconds=exposed,
        arithmetic=arithmetic,
    )


def clip_modes(footprint: Footprint, conditions: Conditions) -> tuple[ClipMode, ...]:
    """The clip modes that a detached step of this training may have.

    Several processes reduce gradients first, so that the step cannot begin before the last gradient is there.
    """
    if conditions.ranks > 1 or not footprint.in_buckets:
        return ("exact",)
    return tuple(mode for mode in CLIP_MODES if mode != "speculative" or footprint.undoable)


def _in_graph_time(
    footprint: Footprint, machine: Machine, conditions: Conditions, parts: int, local: int
) -> tuple[float, Mapping[ClipMode, float] | None, tuple[str, ...]]:
    moved = _part(footprint.traffic, parts)
    norm = _part(_gradients(footprint), parts) if conditions.clips or footprint.clips else 0
    bandwidth = machine.device_bandwidth / (local if machine.shares_memory else 1)
    seconds = (moved + norm) / bandwidth
    read = f" + {gigabytes(norm)} to read the gradients for their norm" if norm else ""
    line = f"in_graph: {gigabytes(moved)} moved{read} / {speed(bandwidth)} = {milliseconds(seconds)}"
    exposed = None if conditions.backward_seconds is None else dict.fromkeys(CLIP_MODES, seconds)
    return seconds, exposed, (line,)


def _detached_time(
    footprint: Footprint, machine: Machine, conditions: Conditions, clip: ClipMode, ranks: int, local: int
) -> tuple[float, Mapping[ClipMode, float] | None, tuple[str, ...]]:
    gradients, weights = _part(_gradients(footprint), ranks), _part(footprint.trained, ranks)
    passed = _part(footprint.master_traffic, ranks)
    share = local if machine.shares_memory else 1  # devices have a link each; processes of one host share its memory
    link_up, link_down = machine.link_to_host / share, machine.link_to_device / share
    bandwidth = machine.host_bandwidth / local
    stages = Stages(
        to_host=gradients / link_up,
        on_host=passed / bandwidth,
        to_device=weights / link_down,
        buckets=max(1, math.ceil(gradients / conditions.bucket_bytes)),
        whole=not footprint.in_buckets,
    )
    seconds = stages.exposed(clip)
    lines = [
        f"detached: gradients to the host: {gigabytes(gradients)} / {speed(link_up)} = {milliseconds(stages.to_host)}",
        f"detached: the host's pass: {gigabytes(passed)} / {speed(bandwidth)} = {milliseconds(stages.on_host)}",
        f"detached: weights to the device: {gigabytes(weights)} / {speed(link_down)} = "
        f"{milliseconds(stages.to_device)}",
        _combined(stages, clip),
    ]
    exposed: dict[ClipMode, float] | None = None
    if conditions.backward_seconds is not None:
        hides = 0.0 if conditions.ranks > 1 else conditions.backward_seconds
        exposed = {mode: stages.exposed(mode, hides) for mode in clip_modes(footprint, conditions)}
        shown = ", ".join(f"{milliseconds(value)} ({mode})" for mode, value in exposed.items())
        lines.append(
            f"detached: behind a backward pass of {milliseconds(conditions.backward_seconds)} there remain {shown}"
        )
    return seconds, exposed, tuple(lines)


def _combined(stages: Stages, clip: ClipMode) -> str:
    """How long the three stages take together."""
    if stages.whole:
        return f"detached: one after the other, as its own step does all at once: {milliseconds(stages.serial)}"
    rest = stages.pipelined - max(stages.to_host, stages.on_host, stages.to_device)
    line = (
        f"detached: in a pipeline of {stages.buckets} buckets: the slowest, and one bucket's fill of "
        f"{milliseconds(rest)} = {milliseconds(stages.pipelined)} (one after the other: {milliseconds(stages.serial)})"
    )
    if clip != "none":
        why = (
            "all gradients come before it"
            if clip == "exact"
            else f"the host's pass takes {SPECULATIVE_FACTOR} times that"
        )
        line += f"; clip={clip!r}: {milliseconds(stages.exposed(clip))}, as {why}"
    return line


def _gradients(footprint: Footprint) -> int:
    """Bytes of the gradients that the optimizer steps with, in the weights' own type."""
    return footprint.trained


def _part(whole: int, parts: int) -> int:
    return -(-whole // parts)


def _too_much(what: str, parts: Mapping[str, int], needed: int, room: int) -> str:
    return f"{summed(parts)} = {gibibytes(needed)} of {what}, and there is room for {gibibytes(room)}"


def summed(parts: Mapping[str, int]) -> str:
    """The sum of some sizes, in words.

    >>> summed({"weights": 2**30, "state": 3 * 2**29})
    'weights 1.0 + state 1.5'
    """
    return " + ".join(f"{name} {gibibytes(size).removesuffix(' GiB')}" for name, size in parts.items() if size)


def gibibytes(size: float) -> str:
    """A memory size as text, in the unit of ``nvidia-smi`` and the system.

    >>> gibibytes(80 * 2**30), gibibytes(5 * 2**20)
    ('80.0 GiB', '0.005 GiB')
    """
    gib = size / 2**30
    return f"{gib:.1f} GiB" if gib >= 0.05 or not gib else f"{gib:.1g} GiB"


def gigabytes(size: float) -> str:
    """An amount of bytes that are moved, as text, in the unit of bandwidths."""
    return f"{_three_digits(size / 1e9)} GB"


def speed(rate: float) -> str:
    """A bandwidth as text.

    >>> speed(4.3e12), speed(1.25e10)
    ('4300 GB/s', '12.5 GB/s')
    """
    return f"{_three_digits(rate / 1e9)} GB/s"


def milliseconds(seconds: float) -> str:
    """A time as text."""
    return f"{_three_digits(seconds * 1e3)} ms"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
