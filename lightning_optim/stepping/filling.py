"""Giving a planned bucket the tensors of one step, if they are still what was planned."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.host.reader import native_meet
from lightning_optim.engines.memory import (
    Ranges,
    Reading,
    extent,
    form,
    has_address,
    in_order_of,
    is_lazy,
    is_plain,
    overlaps_itself,
    problem_of_storage,
    ranges,
    read_any,
    same_order,
)
from lightning_optim.stepping.method import Inputs
from lightning_optim.stepping.observing import Observed
from lightning_optim.stepping.plan import Planned, counter_device
from lightning_optim.stepping.shards import is_distributed, local, same_parts, shards_of
from lightning_optim.stepping.sight import as_seen
from lightning_optim.stepping.tensors import usable_counter
from lightning_optim.stepping.undo import UndoBuffers, undo_name

#: Errors that say nothing about the tensors that were given.
_OF_THE_DEVICE = (torch.OutOfMemoryError, torch.AcceleratorError)


def fill(
    planned: Planned,
    state: Mapping[Any, Any],
    gradients: list[Tensor],
    copies: Mapping[Tensor, Tensor] | None,
    undo: UndoBuffers | None,
    inputs: Inputs,
    observed: Observed,
) -> bool:
    """Gather the tensors of one step; False if a tensor no longer is what the plan was made for.

    Args:
        planned: The bucket.
        state: The optimizer's state.
        gradients: The gradients of all parameters that have one.
        copies: For each parameter, where the new weight is written too.
        undo: Where old values are kept.
        inputs: What the rule needs besides gradients.
        observed: Where the numbers that the rule observes are kept.
    """
    bucket, params = planned.bucket, planned.params
    update = bucket.update
    counts = update.program.counts_steps
    states = [state.get(p) for p in params] if counts or update.slots else []
    try:
        kept = {slot: [s[slot] for s in states] for slot in update.slots}  # type: ignore[index] # None is an error
        steps = [s["step"] for s in states] if counts else []  # type: ignore[index]
    except (KeyError, TypeError):
        return False
    try:
        if undo is not None:
            old = {name: kept.get(name, params) for name in ("p", *update.slots)}
        for name in update.inputs:
            kept[name] = [inputs[name][p] for p in params]
        if copies is not None:
            kept["copy"] = [copies[p] for p in params]
        if undo is not None:
            for name, tensors_of in old.items():
                kept[undo_name(name)] = list(map(undo.buffer, params, [name] * len(bucket), tensors_of))
        for name in update.observations:
            kept[name] = [observed.place(name, p) for p in params]
        tensors = {"p": params, "g": [gradients[i] for i in planned.sources], **kept}
        if planned.view is not None:
            if planned.view is local and not _divided_as_planned(planned, tensors):
                return False
            tensors = {
                name: as_seen(planned.view, name, column) if update.is_elementwise(name) else column
                for name, column in tensors.items()
            }
        if planned.reorder:
            tensors["g"] = list(map(in_order_of, tensors["g"], tensors["p"]))
        if bucket.dense:
            for name in update.inputs:
                tensors[name] = list(map(in_order_of, tensors[name], tensors["p"]))
        every = [*chain.from_iterable(tensors.values()), *steps]
        reading = planned.engine.read(every) if planned.strict else read_any(every)
    except _OF_THE_DEVICE:
        raise
    except (KeyError, RuntimeError, TypeError, AttributeError):  # no tensor, or one of an unexpected kind
        return False
    if not _as_planned(planned, tensors, steps, reading):
        return False
    bucket.tensors, bucket.steps = tensors, steps if counts else None
    if planned.engine.uses_addresses:
        end = len(bucket) * len(tensors)
        bucket.addresses = reading.addresses[:end]
        bucket.step_addresses = None if bucket.steps is None else reading.addresses[end:]
    return True


def _divided_as_planned(planned: Planned, tensors: Mapping[str, list[Tensor]]) -> bool:
    """Whether parameters are sharded as planned, and tensors like their parameters; a copy may be the local part."""
    return all(shards_of(p) == planned.shards for p in planned.params if hasattr(p, "placements")) and all(
        same_parts(t, p) or (name == "copy" and not is_distributed(t))
        for name, column in tensors.items()
        if planned.bucket.update.is_elementwise(name)
        for t, p in zip(column, planned.params, strict=True)
    )


def _as_planned(planned: Planned, tensors: Mapping[str, list[Tensor]], steps: list[Tensor], reading: Reading) -> bool:
    """Whether all tensors have the forms and places in memory that the plan needs.

    If the reading is the same as at the last step, nothing else is checked. Gradients may be elsewhere at every step,
    but must not overlap memory that is written.
    """
    seen, here, count = planned.reading, reading.addresses, len(planned.params)
    if seen is not None and reading.forms == seen.forms:
        there = seen.addresses
        if here == there:
            return True
        kept_their_places = here[:count] == there[:count] and here[2 * count :] == there[2 * count :]
        if kept_their_places and planned.writes is not None:
            return not _meet(planned.writes, here[count : 2 * count], planned.lengths)
    if not (_are_of_the_form(planned, tensors) and _can_count(planned, steps)):
        return False
    return _keep_apart(planned, tensors, steps, reading)


def _are_of_the_form(planned: Planned, tensors: Mapping[str, list[Tensor]]) -> bool:
    bucket = planned.bucket
    if list(map(form, tensors["p"])) != planned.forms:
        return False
    for name, dtype in bucket.layout.dtypes:
        elementwise = bucket.update.is_elementwise(name)
        for tensor, p in zip(tensors[name], tensors["p"], strict=True):
            shape = p.shape if elementwise else bucket.update.shape_of(name, p.shape)
            if tensor.dtype != dtype or tensor.shape != shape or tensor.device != p.device:
                return False
            if bucket.plain and not (name == "p" or is_plain(tensor)):
                return False
            if has_address(tensor) and problem_of_storage(tensor) is not None:
                return False
            if name != "g" and tensor.is_inference() and not torch.is_inference_mode_enabled():
                return False
            if bucket.dense and elementwise:
                if not same_order(tensor, p) or (name != "p" and is_lazy(tensor)):
                    return False
            elif name != "g" and is_plain(tensor) and overlaps_itself(tensor):
                return False
    return True


def _can_count(planned: Planned, steps: list[Tensor]) -> bool:
    there = counter_device(planned.engine, planned.bucket.device) if planned.engine.uses_addresses else None
    return all(usable_counter(step) and there in (None, step.device) for step in steps)


def _keep_apart(planned: Planned, tensors: Mapping[str, list[Tensor]], steps: list[Tensor], reading: Reading) -> bool:
    """Whether tensors share memory only if the plan is for such tensors; keeps the reading for the next step."""
    here, count = reading.addresses, len(planned.params)
    every = [*chain.from_iterable(tensors.values()), *steps]
    lengths = array("q", [extent(t) if has_address(t) else 0 for t in every])
    gradients = slice(count, 2 * count)
    writes = ranges(here[:count] + here[2 * count :], lengths[:count] + lengths[2 * count :])
    if writes is not None and _meet(writes, here[gradients], lengths[gradients]):
        writes = None
    # A new plan may be for shared memory although nothing is shared any more: making it moves counters apart.
    if (writes is None) != planned.bucket.aliased and (writes is None or planned.reading is not None):
        return False
    planned.reading, planned.writes, planned.lengths = reading, writes, lengths[gradients]
    return True


def _meet(writes: Ranges, begins: array[int], lengths: array[int]) -> bool:
    native = native_meet()
    return writes.meet(begins, lengths) if native is None else native(writes.bounds, begins, lengths)
