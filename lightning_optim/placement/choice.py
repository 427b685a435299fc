"""The choice of a placement for a training by the golden rule, with the reason in words and numbers.

The rule: a step is in graph by default. It is detached if the device's memory is too small (or ran out in a run), if
the optimizer needs a long history or a line search, or if float64 masters are wanted.

All processes of a training must choose alike although their free memory differs, so they choose for the
:meth:`~lightning_optim.placement.machine.Machine.weakest` of their machines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_optim.checks import POSITIVE_FINITE, check_number
from lightning_optim.placement.footprint import Footprint
from lightning_optim.placement.machine import Machine
from lightning_optim.placement.needs import (
    ACTIVATION_RESERVE,
    MARGIN,
    PLACEMENTS,
    SHARDINGS,
    Conditions,
    Needs,
    Placement,
    clip_modes,
    gibibytes,
    milliseconds,
    needs,
)
from lightning_optim.placement.state_size import State
from lightning_optim.placement.step_time import CLIP_MODES, ClipMode

#: The largest number of ranks that is tried when nothing fits: beyond it, other ways of sharding are needed.
MOST_RANKS = 1024


class PlacementError(RuntimeError):
    """No placement fits; the message gives the arithmetic and says what would fit."""


@dataclass(frozen=True)
class Plan:
    """A placement plan: the placement that was chosen, and why.

    Attributes:
        placement: ``"in_graph"`` or ``"detached"``.
        reason: The reason for the placement, in words and numbers.
        clip: The clip mode for a detached step.
        rows: What each placement needs, ``in_graph`` first.
        footprint: The footprint of the training.
        machine: The machine that the plan was made for.
        conditions: The conditions that the plan was made for.
        notes: What was assumed, estimated or left out.
    """

    placement: Placement
    reason: str
    clip: ClipMode
    rows: tuple[Needs, ...]
    footprint: Footprint
    machine: Machine
    conditions: Conditions
    notes: tuple[str, ...] = ()

    def __getitem__(self, placement: Placement) -> Needs:
        """What a placement needs."""
        return self.rows[PLACEMENTS.index(placement)]

    def table(self) -> list[list[str]]:
        """The plan as a table, head first: memory for each process, and the estimated times."""
        head = ["placement", "device needs", "device room", "host needs", "host room", "step"]
        head += [f"visible ({mode})" for mode in CLIP_MODES]
        lines = [[*head, "fits"]]
        for row in self.rows:
            seen = row.exposed_seconds
            times = [milliseconds(seen[mode]) if seen and mode in seen else "-" for mode in CLIP_MODES]
            device, host = (gibibytes(size) for size in (row.device_bytes, row.host_bytes))
            rooms = [gibibytes(row.device_room), gibibytes(row.host_room)]
            if row.shares_memory:
                rooms[0] = "(host)"
            fits = "yes" if row.fits else "no"
            lines.append(
                [row.placement, device, rooms[0], host, rooms[1], milliseconds(row.step_seconds), *times, fits]
            )
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The plan in primitives, for JSON."""
        rows = [
            {**asdict(row), "device_bytes": row.device_bytes, "host_bytes": row.host_bytes, "lacks": row.lacks}
            for row in self.rows
        ]
        return {**asdict(self), "rows": rows}

    def __str__(self) -> str:
        return f"{self.placement}: {self.reason}"


def choose(
    footprint: Footprint,
    machine: Machine,
    conditions: Conditions | None = None,
    *,
    measured: Mapping[Placement, float] | None = None,
) -> Plan:
    """Choose between in_graph and detached by the golden rule.

    Args:
        footprint: The training's footprint: see :func:`~lightning_optim.placement.footprint.footprint`.
        machine: The machine to run it on, such as ``Machine.measure()``.
        conditions: How the training is run; default: one process, no clipping.
        measured: The visible seconds of an optimizer step, as measured in runs with either placement. Estimated times
            are shown, but do not overturn the rule.

    Raises:
        PlacementError: Neither placement fits.
        ValueError: ``measured`` does not have exactly the two placements, or a time is not positive.

    >>> import torch
    >>> from torch import nn
    >>> from lightning_optim import AdamW
    >>> from lightning_optim.placement.footprint import footprint
    >>> card = Machine("cuda", "a card", 1, 24 << 30, 128 << 30, 2e10, 2e10, 4e10, 9e11)
    >>> print(choose(footprint([nn.Parameter(torch.empty(10**9, device="meta"))], AdamW), card).placement)
    in_graph
    >>> print(choose(footprint([nn.Parameter(torch.empty(2 * 10**9, device="meta"))], AdamW), card).placement)
    detached
    """
    conditions = conditions or Conditions()
    _check_measured(measured)
    clip = _clip_mode(footprint, machine, conditions)
    in_graph = needs("in_graph", footprint, machine, conditions)
    detached = needs("detached", footprint, machine, conditions, clip)
    notes = _notes(footprint, machine, conditions)
    host_reason = footprint.needs_host
    if host_reason is None and in_graph.fits:
        placement, reason = _where_in_graph_fits(in_graph, detached, measured)
    elif detached.fits:
        why = host_reason or f"in_graph does not fit ({in_graph.lacks})"
        placement, reason = "detached", f"{why}; {_room(detached, 'detached')}"
    else:
        raise PlacementError(_nothing_fits(footprint, machine, conditions, in_graph, detached))
    return Plan(placement, reason, clip, (in_graph, detached), footprint, machine, conditions, notes)


def fall_back(plan: Plan, error: BaseException) -> Plan:
    """The plan that follows when a run with ``plan`` has run out of device memory.

    Args:
        plan: The plan of the run that failed.
        error: The ``torch.OutOfMemoryError`` that was raised; its first line becomes part of the reason.

    Raises:
        PlacementError: The plan's step was detached already, or the host has no room.
    """
    said = str(error).partition("\n")[0][:200] or type(error).__name__
    detached = plan["detached"]
    if plan.placement == "detached":
        raise PlacementError(
            f"out of device memory although masters and state are in host memory already ({said}); what is left there "
            f"is {summed_device(detached)}: valid: a smaller batch, activation checkpointing, or sharding='fsdp2'"
        ) from error
    if not detached.fits:
        raise PlacementError(
            f"out of device memory ({said}), and the host has no room for a detached step: {detached.lacks}"
        ) from error
    moved = plan["in_graph"].device.get("state", 0)
    reason = (
        f"in_graph ran out of device memory ({said}); the optimizer's state moves to the host, which frees "
        f"{gibibytes(moved)} of the device; {_room(detached, 'detached')}"
    )
    return replace(plan, placement="detached", reason=reason)


def summed_device(row: Needs) -> str:
    """The device memory that a placement needs, in words."""
    return ", ".join(f"{gibibytes(size)} for {name}" for name, size in row.device.items() if size)


def _where_in_graph_fits(
    in_graph: Needs, detached: Needs, measured: Mapping[Placement, float] | None
) -> tuple[Placement, str]:
    room = _room(in_graph, "the step")
    if measured is None:
        return "in_graph", f"{room}, and nothing needs the host: the step stays in the device's queue"
    shown = ", ".join(f"{name} {milliseconds(measured[name])}" for name in PLACEMENTS)
    if measured["detached"] < measured["in_graph"] and detached.fits:
        return "detached", f"both fit, and it was measured to be the faster one ({shown})"
    return "in_graph", f"{room}, and detached was not measured to be faster ({shown})"


def _room(row: Needs, what: str) -> str:
    if row.shares_memory:
        both = gibibytes(row.device_bytes + row.host_bytes)
        return f"{what} needs {both} of memory (room for {gibibytes(row.host_room)})"
    text = f"{what} needs {gibibytes(row.device_bytes)} of the device's memory (room for {gibibytes(row.device_room)})"
    if row.host_bytes:
        text += f" and {gibibytes(row.host_bytes)} of the host's (room for {gibibytes(row.host_room)})"
    return text


def _clip_mode(footprint: Footprint, machine: Machine, conditions: Conditions) -> ClipMode:
    """The clip mode that a detached step should have."""
    modes = clip_modes(footprint, conditions)
    if "none" in modes and not (conditions.clips or footprint.clips):
        return "none"
    if "speculative" not in modes or conditions.backward_seconds is None:
        return "exact"  # without the backward pass's time the gain of "speculative" is unknown, and it needs memory
    row = needs("detached", footprint, machine, conditions, "speculative")
    assert row.exposed_seconds is not None  # noqa: S101
    faster = row.exposed_seconds["speculative"] < row.exposed_seconds["exact"]
    return "speculative" if faster and row.fits else "exact"


def _check_measured(measured: Mapping[Placement, float] | None) -> None:
    if measured is None:
        return
    valid = f"seconds > 0 for {' and '.join(PLACEMENTS)}"
    if set(measured) != set(PLACEMENTS):
        raise ValueError(f"measured={dict(measured)!r}; valid: {valid}")
    for placement, seconds in measured.items():
        check_number("", f"measured[{placement!r}]", seconds, POSITIVE_FINITE.described(valid))


def _notes(footprint: Footprint, machine: Machine, conditions: Conditions) -> tuple[str, ...]:
    notes = [f"{MARGIN:.0%} of free memory is left alone, for what cannot be counted beforehand"]
    if conditions.activation_bytes is None:
        notes.append(
            f"activations are not counted: {ACTIVATION_RESERVE:.0%} of the device's free memory is reserved for them"
        )
    notes.append("a detached step's gradients are counted whole, although most are freed before the last one is there")
    notes.append(f"{footprint.optimizer}'s state: {footprint.state.known_by}")
    if not footprint.by_rule:
        notes.append(
            f"times are least times: {footprint.optimizer} steps by operators that move more than one pass does"
        )
    if footprint.needs_closure:
        notes.append("the evaluations of the loss that a step makes are not counted")
    notes.extend(footprint.notes)
    if machine.shares_memory:
        notes.append("there is no accelerator: both placements live in host memory")
    if conditions.ranks > 1:
        notes.append("between several processes a detached step begins when the gradients have been reduced")
        notes.append("the time to gather weights and reduce gradients between processes is not counted")
        if conditions.sharding == "fsdp2":
            notes.append("nor are FSDP2's gathered layers, of which one or two are whole at a time")
    return (*notes, *machine.notes)


def _nothing_fits(
    footprint: Footprint, machine: Machine, conditions: Conditions, in_graph: Needs, detached: Needs
) -> str:
    lines = ["no placement fits:"]
    lines.append(f"  in_graph: {footprint.needs_host or in_graph.lacks}")
    lines.append(f"  detached: {detached.lacks}")
    found = [name for name, changed in _remedies(footprint, machine, conditions) if _fits(changed, machine, conditions)]
    # If one change is enough, its combinations with another are not listed.
    listed: list[str] = []
    for name in found:
        if not any(set(other.split(" and ")) < set(name.split(" and ")) for other in listed):
            listed.append(name)
    ranks = _ranks_that_fit(footprint, machine, conditions)
    listed += [
        f"{count} ranks with sharding={sharding!r} on {_hosts(count, machine)}" for sharding, count in ranks.items()
    ]
    if listed:
        lines.append(f"it would fit with: {'; or '.join(listed)}")
    else:
        lines.append("neither a smaller state nor more ranks would do: only a smaller model or a larger machine")
    if conditions.activation_bytes is None and "device memory" in (detached.lacks or ""):
        lines.append("(give activation_bytes if activations are known to need less than the reserve)")
    return "\n".join(lines)


def _fits(footprint: Footprint, machine: Machine, conditions: Conditions) -> bool:
    in_graph = footprint.needs_host is None and needs("in_graph", footprint, machine, conditions).fits
    return in_graph or needs("detached", footprint, machine, conditions).fits


def _remedies(footprint: Footprint, machine: Machine, conditions: Conditions) -> Iterator[tuple[str, Footprint]]:
    """Changes that make the state smaller, each with the footprint that results."""
    if footprint.by_rule:
        numbers, state, master_state = footprint.parameters, footprint.state, footprint.master_state
        if state.bytes > 3 * state.values:  # most of it is wider than two bytes
            yield (
                "lightning_optim's state_dtype='bfloat16'",
                _with_state(footprint, 2 * state.values, 2 * master_state.values),
            )
        if state.values > numbers:
            yield "lightning_optim's Lion", _with_state(footprint, 4 * numbers, 4 * numbers)
            both = _with_state(footprint, 2 * numbers, 2 * numbers)
            yield "lightning_optim's Lion and lightning_optim's state_dtype='bfloat16'", both
    if footprint.history:
        vector = footprint.masters  # the bytes of one vector; a past step takes two
        for history in range(footprint.history - 1, 0, -1):
            less = 2 * (footprint.history - history) * vector
            sizes = [max(0, state.bytes - less) for state in (footprint.state, footprint.master_state)]
            shorter = replace(_with_state(footprint, *sizes), history=history)
            if _fits(shorter, machine, conditions):
                yield f"history_size={history}", shorter
                return


def _with_state(footprint: Footprint, state: int, master_state: int) -> Footprint:
    return replace(
        footprint, state=State(state, 0, "what it would be"), master_state=State(master_state, 0, "what it would be")
    )


def _hosts(ranks: int, machine: Machine) -> str:
    count = -(-ranks // machine.devices)
    return "this machine" if count == 1 else f"{count} machines like this one"


def _ranks_that_fit(footprint: Footprint, machine: Machine, conditions: Conditions) -> dict[str, int]:
    """For each way of sharding, the least power of two of ranks with which it fits, on machines like this one."""
    found: dict[str, int] = {}
    if footprint.divided or footprint.history or footprint.needs_closure:  # a history spans all weights
        return found
    for sharding in SHARDINGS:
        count = 2
        while count <= MOST_RANKS and sharding not in found:
            more = count > conditions.ranks or sharding != conditions.sharding
            local = min(count, machine.devices)
            changed = replace(conditions, ranks=count, local_ranks=local, sharding=sharding)
            if more and count >= conditions.ranks and _fits(footprint, machine, changed):
                found[sharding] = count
            count *= 2
    return found
