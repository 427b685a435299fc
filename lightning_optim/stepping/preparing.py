"""Preparing state for engines: missing slots are made, and loaded ones are brought into the expected form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.ambient import of_normal_tensors
from lightning_optim.engines.memory import in_order_of, is_dense, is_lazy, is_plain, overlaps_itself
from lightning_optim.rules.slots import Slot
from lightning_optim.stepping.method import Group
from lightning_optim.stepping.new_state import NewState
from lightning_optim.stepping.plan import Member, Planner
from lightning_optim.stepping.shards import is_distributed, local
from lightning_optim.stepping.tensors import check_slot, counted, usable_counter


@of_normal_tensors
def prepare(planner: Planner, members: list[Member], new: NewState) -> None:
    """Create the state that is missing, and bring loaded state into the form that engines expect.

    Args:
        planner: Knows the slots.
        members: The parameters.
        new: Records what is created.

    Raises:
        RuntimeError: State that does not fit its parameter.
    """
    state = planner.owner.state
    for member in members:
        p, label = member.param, member.label
        group = planner.owner.param_groups[member.group_number]
        slots = planner.slots(group, p)
        if not slots and not planner.counts_steps():
            continue  # no state, not even an empty dict, as in torch
        values = new.of(state, p)
        if not isinstance(values, dict):
            raise RuntimeError(f"{label}: its state is {values!r}; valid: a dict")
        if planner.counts_steps():
            step = values.get("step")
            if step is None:
                new.put(p, values, "step", torch.zeros((), dtype=torch.float32, device="cpu"))
            elif not usable_counter(step):
                values["step"] = torch.tensor(counted(label, step), dtype=torch.float32, device="cpu")
        for name in slots:
            slot = planner.slot(name)
            value = values.get(name)
            if value is None:
                if slot.rate != "shared" or (value := _common(planner, name)) is None:
                    initial = _initial(planner, group, slot)
                    value = new_slot(p, slot, planner.slot_dtype(p, name), initial)
                new.put(p, values, name, value)
                continue
            check_slot(label, p, name, value, slot)
            values[name] = _formed(value, p, slot)
    _unite(planner)


def new_slot(p: Tensor, slot: Slot, dtype: torch.dtype, initial: float | Tensor) -> Tensor:
    """A slot's tensor before the first step.

    Args:
        p: The parameter.
        slot: The slot's declaration.
        dtype: Its storage type.
        initial: Its value, unless it begins as a copy of the weight.
    """
    if slot.init == "p":
        return torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False).copy_(p)
    if slot.is_plain:
        zeros = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    else:
        zeros = zeros_for(p, slot, dtype)
    if isinstance(initial, Tensor):
        return zeros.copy_(initial)
    return zeros if initial == 0 else zeros.fill_(initial)  # not through a float32 tensor, which would round it


def zeros_for(p: Tensor, slot: Slot, dtype: torch.dtype) -> Tensor:
    """Zeros of a slot's shape, sharded like the weight along the dimensions that both have."""
    shape = slot.shape_for(p.shape)
    if slot.is_scalar or not is_distributed(p):
        return torch.zeros(shape, dtype=dtype, device=p.device)
    from torch.distributed.tensor import Replicate, zeros  # needed for DTensors only

    # The side over which a mean is taken is not sharded, even if it has one element.
    taken = {"row": p.ndim - 1, "column": p.ndim - 2}.get(slot.rate)
    whole = [
        dimension == taken or dimension >= len(shape) or shape[dimension] != size
        for dimension, size in enumerate(p.shape)
    ]
    placements = [
        Replicate() if place.is_replicate() or whole[place.dim] else place
        for place in p.placements  # type: ignore[attr-defined] # of a DTensor
    ]
    return zeros(shape, dtype=dtype, device_mesh=p.device_mesh, placements=placements)  # type: ignore[attr-defined]


def _initial(planner: Planner, group: Group, slot: Slot) -> float | Tensor:
    if not isinstance(slot.init, str):
        return float(slot.init)
    if slot.init == "p":
        return 0.0
    value = planner.scalars(group)[slot.init]
    return value if isinstance(value, Tensor) else float(value)


def _formed(value: Tensor, p: Tensor, slot: Slot) -> Tensor:
    """An existing slot in the form that engines expect: the same tensor if it has this form."""
    if slot.is_plain and is_plain(local(p)) and is_dense(p):
        value = in_order_of(value, p)
    elif is_lazy(value) or (is_plain(value) and overlaps_itself(value)):
        value = torch.empty_like(value, memory_format=torch.contiguous_format).copy_(value)
    if value.is_inference() and not torch.is_inference_mode_enabled():
        value = value.clone()  # a normal tensor, which can be written here
    return value


def _common(planner: Planner, name: str) -> Tensor | None:
    """The slot that all parameters share, if any of them has it."""
    for group in planner.owner.param_groups:
        for p in group["params"]:
            values = planner.owner.state.get(p) or {}
            if isinstance(values, Mapping) and isinstance(value := values.get(name), Tensor):
                return value
    return None


def _unite(planner: Planner) -> None:
    """Make each slot that all parameters share one tensor, also if it was loaded parameter by parameter."""
    for name, slot in planner.method.rule.slots.items():
        if slot.rate == "shared" and (common := _common(planner, name)) is not None:
            for group in planner.owner.param_groups:
                for p in group["params"]:
                    values: dict[str, Any] = planner.owner.state.get(p) or {}
                    if name in values:
                        values[name] = common
