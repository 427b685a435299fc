"""Giving a planned bucket the tensors of one step, if they are still what was planned."""

from __future__ import annotations

import operator
import weakref
from array import array
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.memory import Reading, aliased, form, in_order_of, is_lazy, is_plain, same_order
from lightning_optim.optimizers.plan import Planned, counter_device
from lightning_optim.optimizers.undo import UndoBuffers, undo_name

#: Errors that are no statement about the tensors that were given.
_OF_THE_DEVICE = (torch.OutOfMemoryError, torch.AcceleratorError)


def fill(
    planned: Planned,
    state: Mapping[Any, Any],
    gradients: list[Tensor],
    copies: Mapping[Tensor, Tensor] | None,
    undo: UndoBuffers | None,
) -> bool:
    """Gather the tensors of one step; False if one no longer is what the plan was made for.

    Args:
        planned: The bucket.
        state: The optimizer's.
        gradients: Of all parameters that have one.
        copies: For each parameter, where the new weight is written too.
        undo: Where old values are kept.
    """
    bucket = planned.bucket
    update = bucket.update
    counts = "step" in update.program.scalars
    # Of a rule without state nothing is asked for: the answer would be an empty state, kept from then on.
    states = [state[p] for p in planned.params] if update.slots or counts else []
    try:
        kept = {slot: [s[slot] for s in states] for slot in update.slots}
        steps = [s["step"] for s in states] if counts else []
    except KeyError:
        return False
    if undo is not None:
        old = {name: kept.get(name, planned.params) for name in ("p", *update.slots)}
    if copies is not None:
        kept["copy"] = [copies[p] for p in planned.params]
    if undo is not None:
        for name, tensors_of in old.items():
            kept[undo_name(name)] = list(map(undo.buffer, planned.params, [name] * len(bucket), tensors_of))
    tensors = {"p": planned.params, "g": [gradients[i] for i in planned.sources], **kept}
    try:
        if planned.view is not None:
            tensors = {name: list(map(planned.view, column)) for name, column in tensors.items()}
        if planned.reorder:
            tensors["g"] = list(map(in_order_of, tensors["g"], tensors["p"]))
        reading = planned.engine.read([*chain.from_iterable(tensors.values()), *steps])
    except _OF_THE_DEVICE:
        raise
    except (RuntimeError, TypeError, AttributeError):  # no tensor at all, or one of quite another kind
        return False
    if not _as_planned(planned, tensors, steps, [*chain.from_iterable(kept.values()), *steps], reading):
        return False
    bucket.tensors, bucket.steps = tensors, steps if counts else None
    if planned.engine.uses_addresses:
        end = len(bucket) * len(tensors)
        bucket.addresses = reading.addresses[:end]
        bucket.step_addresses = None if bucket.steps is None else reading.addresses[end:]
    return True


def _as_planned(
    planned: Planned, tensors: Mapping[str, list[Tensor]], steps: list[Tensor], kept: list[Tensor], reading: Reading
) -> bool:
    """Whether all tensors have the types and the order in memory that were planned.

    The very tensors of the last step, where and as they were, need no second look; gradients are others at every step.
    """
    bucket, seen = planned.bucket, planned.reading
    count = len(bucket)
    here = reading.addresses or array("q", map(Tensor.data_ptr, tensors["p"]))
    if seen is not None and reading.forms == seen.forms and len(kept) == len(planned.kept):
        same_place = here[:count] == seen.addresses[:count] and here[2 * count :] == seen.addresses[2 * count :]
        if same_place and all(map(operator.is_, map(operator.call, planned.kept), kept)):
            return True
    if list(map(form, tensors["p"])) != planned.forms or aliased(tensors["p"]) != bucket.aliased:
        return False
    for name, dtype in bucket.layout.dtypes:
        for tensor, p in zip(tensors[name], tensors["p"], strict=True):
            if tensor.dtype != dtype or tensor.shape != p.shape or tensor.device != p.device:
                return False
            if bucket.plain and name != "p" and not is_plain(tensor):
                return False
            if bucket.dense and (not same_order(tensor, p) or (name != "p" and is_lazy(tensor))):
                return False
    for step in steps:
        if step.dtype != torch.float32 or step.numel() != 1 or not is_plain(step):
            return False
        if planned.engine.uses_addresses and step.device != counter_device(planned.engine, bucket.device):
            return False
    planned.kept = list(map(weakref.ref, kept))
    planned.reading = Reading(here, reading.forms)
    return True
