"""Which parameters go into which bucket, and which engine runs it."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.base import Bucket, Decision, Engine, Layout, dtype_name, math_dtype
from lightning_optim.engines.choice import choose
from lightning_optim.engines.memory import (
    Ranges,
    Reading,
    form,
    has_address,
    in_order_of,
    is_dense,
    is_plain,
)
from lightning_optim.rules.policy import KAHAN_SLOT, Policy, Update
from lightning_optim.rules.slots import Slot
from lightning_optim.stepping.method import Group, Inputs, Method, Options, Owner, Part
from lightning_optim.stepping.new_state import NewState
from lightning_optim.stepping.shards import Shards, local, shards_of
from lightning_optim.stepping.sight import as_seen, share_memory, view_of
from lightning_optim.stepping.tensors import check_gradient, check_weight
from lightning_optim.stepping.undo import undo_name

_PLAIN = Slot()

make_update = lru_cache(maxsize=None)(Update)  # few distinct ones; each is traced once per process


@dataclass
class Member:
    """A parameter that has a gradient at this step.

    Attributes:
        index: Its place among the gradients of this step.
        param: The parameter.
        group_number: The number of its param group.
        id: Its number among all parameters of the optimizer.
        fresh: Whether it has no slots yet, and its first update differs from the later ones.
        label: The parameter in words, for messages.
    """

    index: int
    param: Tensor
    group_number: int
    id: int
    fresh: bool
    label: str


@dataclass
class Planned:
    """A bucket, its engine, and how it is filled at every step.

    Attributes:
        bucket: What the engine is given.
        engine: The engine.
        decision: Why this engine was chosen.
        params: The bucket's parameters.
        forms: Their sizes, strides, types and devices, as the engine sees them.
        sources: The place of each parameter's gradient among the gradients of the step.
        view: How the engine must look at the tensors (complex numbers as pairs, a DTensor's shard), or None.
        shards: The mesh dimensions over which the tensors are divided, if the engine is given their local parts.
        reorder: Whether gradients have another order in memory than their parameters, and must be copied.
        strict: Whether all tensors are torch's own and have addresses.
        reading: The reading of all tensors when they were last found to be as planned.
        writes: The ranges of memory that were written then; None if they, or one of them and a gradient, overlap.
        lengths: The extent of each gradient, in bytes.
    """

    bucket: Bucket
    engine: Engine
    decision: Decision
    params: list[Tensor]
    forms: list[Any]
    sources: list[int]
    view: Callable[[Tensor], Tensor] | None
    shards: Shards
    reorder: bool
    strict: bool
    reading: Reading | None = None
    writes: Ranges | None = None
    lengths: array[int] = field(default_factory=lambda: array("q"))


class Planner:
    """Divides the parameters of an optimizer into buckets.

    Args:
        owner: Has ``param_groups`` and ``state``.
        method: The rule, and how a param group's options map to its inputs.
        options: The options that hold for all groups.
        native_state: Create slots in the weight's dtype, as torch's own optimizers do.
        part: Which part of an update the buckets do.
    """

    def __init__(self, owner: Owner, method: Method, options: Options, native_state: bool, part: Part = "all") -> None:
        self.owner = owner
        self.part = part
        self.method = method
        self.options = options
        self.native_state = native_state
        #: The parameters' numbers, for the noise of stochastic rounding; None: their order in the param groups.
        self.numbers: Sequence[int] | None = None

    def slot(self, name: str) -> Slot:
        """The declaration of a slot."""
        return self.method.rule.slots.get(name, _PLAIN)

    def slot_dtype(self, p: Tensor, slot: str) -> torch.dtype:
        """The storage type of a new slot of parameter ``p``."""
        wide = math_dtype(p.dtype)
        declared = self.slot(slot)
        if declared.rate == "shared":  # one tensor, of the widest math type of any parameter
            every = {math_dtype(q.dtype) for group in self.owner.param_groups for q in group["params"]}
            return torch.float64 if torch.float64 in every else torch.float32
        if declared.is_scalar or declared.shape is not None:  # matrices are decomposed, in this type
            return wide
        if slot == KAHAN_SLOT or self.native_state:
            return p.dtype
        # A slot that begins as a copy of the weight is stepped like one: bfloat16 would round small steps away.
        real = wide if declared.init == "p" else self.options.state_dtype or wide
        return real.to_complex() if p.is_complex() else real

    def slots(self, group: Group, p: Tensor) -> tuple[str, ...]:
        """Names of the slots that parameter ``p`` has."""
        update = self._update(group, p, fresh=False)
        return (*update.slots, *update.shared_slots)

    def counts_steps(self) -> bool:
        """Whether the state has a ``step``."""
        return self.method.rule.counts_steps or self.options.rounding == "stochastic"

    def members(self, found: Sequence[Tensor | None]) -> list[Member]:
        """The parameters that have a gradient, from the gradient or None of every parameter.

        Raises:
            RuntimeError: A gradient that is sparse, or of another shape, device or kind of number than its parameter; a
                weight that cannot be written.
        """
        members: list[Member] = []
        places = [
            (group_number, group, index)
            for group_number, group in enumerate(self.owner.param_groups)
            for index in range(len(group["params"]))
        ]
        for number, ((group_number, group, index), g) in enumerate(zip(places, found, strict=True)):
            if g is not None:
                p = group["params"][index]
                label = f"parameter {number} ({_named(group, index)}shape {tuple(p.shape)}, {p.device})"
                check_weight(label, p)
                check_gradient(label, p, g)
                id = number if self.numbers is None else self.numbers[number]
                members.append(Member(len(members), p, group_number, id, self._fresh(group, p), label))
        return members

    def _fresh(self, group: Group, p: Tensor) -> bool:
        state = self.owner.state.get(p) or {}
        if any(state.get(slot) is not None for slot in self.method.rule.all_slots):
            return False
        return self.method.flags(group, p, True) != self.method.flags(group, p, False)

    def flags(self, group: Group, p: Tensor, fresh: bool) -> dict[str, bool]:
        """Values of the rule's flags, including those that are set at every n-th step."""
        flags = {name: bool(value) for name, value in self.method.flags(group, p, fresh).items()}
        return flags | {flag: self.method.rule.due(group, flag) for flag in self.method.rule.every}

    def scalars(self, group: Group) -> dict[str, float | Tensor]:
        """The numbers of a param group by the rule's names; shared scalars are those of the first group."""
        values = self.method.scalars(group)
        if self.method.rule.shared:
            first = self.method.scalars(self.owner.param_groups[0])
            values.update({name: first[name] for name in self.method.rule.shared})
        return values

    def static(self, group: Group) -> tuple[Any, ...]:
        """The values of a group's options that are compiled in, and may have been changed since the last step."""
        flags = self.flags(group, group["params"][0], False) if group["params"] else {}
        switches = [value for value in group.values() if isinstance(value, bool)]  # a flag may depend on the parameter
        return (self.method.decay(group), *flags.values(), *switches)

    def _update(
        self, group: Group, p: Tensor, *, fresh: bool, copy: bool = False, scaled: bool = False, undo: bool = False
    ) -> Update:
        flags = self.flags(group, p, fresh)
        rule = self.method.rule
        options = self.options
        low: tuple[str, ...] = ()
        if options.rounding == "stochastic":
            low = tuple(s for s in rule.slots_under(flags) if self._stored_dtype(p, s) == torch.bfloat16)
        decay = self.method.decay(group)
        if self.part == "within" or (self.part != "all" and (decay == "l2") != (self.part == "direction")):
            decay = "none"  # the direction's Program applies L2, the move's all other forms
        policy = Policy(
            decay=decay,
            cautious=bool(group.get("cautious", False)) and self.part == "all",
            maximize=bool(group.get("maximize", False)) and self.part in ("all", "direction"),
            scaled=scaled,
            rounding=options.rounding,
            weight_dtype=dtype_name(p.dtype),
            low_precision_slots=low,
            copy=copy,
            undo=undo,
            direction=self.part in ("direction", "within"),
            observe=options.observe,
        )
        return make_update(rule, policy, tuple(sorted(flags.items())))

    def _stored_dtype(self, p: Tensor, slot: str) -> torch.dtype:
        value = self.owner.state.get(p, {}).get(slot) if p in self.owner.state else None
        return value.dtype if isinstance(value, Tensor) else self.slot_dtype(p, slot)

    def _plain(self, p: Tensor, g: Tensor, update: Update, copies: Mapping[Tensor, Tensor] | None) -> bool:
        state = self.owner.state.get(p) or {}
        slots = [state[slot] for slot in update.slots if isinstance(state.get(slot), Tensor)]
        if hasattr(p, "to_local"):
            slots = [local(slot) for slot in slots]
        return all(map(is_plain, [g, *slots, *([copies[p]] if copies is not None else [])]))

    def build(
        self,
        members: list[Member],
        gradients: Sequence[Tensor],
        copies: Mapping[Tensor, Tensor] | None,
        scaled: bool,
        undo: bool = False,
        new: NewState | None = None,
        inputs: Inputs | None = None,
    ) -> list[Planned]:
        """The buckets for these members and their gradients.

        Args:
            members: The parameters.
            gradients: The gradient of each.
            copies: For each parameter, a tensor to which the new weight is written too; None: there are no copies.
            scaled: Whether gradients are to be multiplied by ``grad_scale``.
            undo: Whether the old values are kept.
            new: The record of what has been created for them.
            inputs: What the rule needs besides gradients; None in a report, where gradients stand in for it.

        Raises:
            RuntimeError: The rule needs an input that is not given.
        """
        same: dict[tuple[Any, ...], list[Member]] = {}
        for member, g in zip(members, gradients, strict=True):
            p, group = member.param, self.owner.param_groups[member.group_number]
            update = self._update(group, p, fresh=member.fresh, copy=copies is not None, scaled=scaled, undo=undo)
            dtypes = {"p": p.dtype, "g": g.dtype}
            dtypes.update({slot: self._stored_dtype(p, slot) for slot in update.slots})
            dtypes.update({name: _given(name, p, g, inputs, member.label).dtype for name in update.inputs})
            if copies is not None:
                dtypes["copy"] = copies[p].dtype
            if undo:
                dtypes.update({undo_name(name): dtypes[name] for name in ("p", *update.slots)})
            dtypes.update(dict.fromkeys(update.observations, torch.float32))
            view = view_of(p, g, update)
            shards = shards_of(p) if view is local else ()
            layout = Layout(
                math=math_dtype(p.dtype),
                dtypes=tuple((name, dtype.to_real()) for name, dtype in dtypes.items()),
            )
            seen = p if view is not local else view(p)
            dense = is_plain(seen) and is_dense(seen)  # other classes do not show their order in memory
            plain = self._plain(p, g if view is not local else view(g), update, copies)
            key = (update, layout, p.device, dense, plain, view, shards)
            same.setdefault(key, []).append(member)
        plan = []
        for (update, layout, device, dense, plain, view, shards), bucket_members in same.items():
            params = [m.param for m in bucket_members]
            sources = [m.index for m in bucket_members]
            weights = as_seen(view, "p", params)
            given = as_seen(view, "g", [gradients[i] for i in sources])
            bucket = Bucket(
                update=update,
                layout=layout,
                device=device,
                tensors={"p": weights},
                steps=None,
                groups=array("i", [m.group_number for m in bucket_members]),
                ids=array("i", [m.id for m in bucket_members]),
                sizes=tuple(p.numel() for p in weights),
                plain=plain,
                dense=dense,
                aliased=self._aliased(params, update, [gradients[i] for i in sources], copies),
                label=f"{self.method.public_name()}, {_described(layout, device, len(bucket_members))}",
            )
            engine, decision = choose(bucket, self.options.engine)
            if update.program.counts_steps:
                self._place_counters(params, counter_device(engine, device), new or NewState())
            reorder = dense and not all(map(operator.is_, map(in_order_of, given, weights), given))
            forms = list(map(form, weights))
            strict = plain and all(map(has_address, weights))
            plan.append(Planned(bucket, engine, decision, params, forms, sources, view, shards, reorder, strict))
        return plan

    def _aliased(
        self, params: list[Tensor], update: Update, gradients: list[Tensor], copies: Mapping[Tensor, Tensor] | None
    ) -> bool:
        states = [self.owner.state.get(p) or {} for p in params]  # in a report, there may be none yet
        slots = [value for s in states for name in (*update.slots, "step") if isinstance(value := s.get(name), Tensor)]
        return share_memory(params, gradients, slots, [copies[p] for p in params] if copies is not None else [])

    def _place_counters(self, params: list[Tensor], device: torch.device, new: NewState) -> None:
        """Move step counters to where the engine keeps them."""
        for p in params:
            state = self.owner.state.get(p) or {}  # in a report, there may be none yet
            if isinstance(step := state.get("step"), Tensor) and step.device != device:
                # A copy to a device need not wait; after one to the CPU, the host reads, so it waits.
                new.replace(p, state, "step", step.to(device, non_blocking=device.type != "cpu"))


def _given(name: str, p: Tensor, g: Tensor, inputs: Inputs | None, label: str) -> Tensor:
    """An input of a parameter's rule."""
    if inputs is None:
        return g
    if (value := inputs.get(name, {}).get(p)) is None:
        given = ", ".join(inputs) or "nothing"
        raise RuntimeError(f"{label}: its step needs {name!r} beside the gradient, and was given {given}")
    check_gradient(f"{label}, {name!r}", p, value)
    return value


def counter_device(engine: Engine, device: torch.device) -> torch.device:
    """Where an engine keeps the step counters of weights on ``device``."""
    return device if engine.controls_on_device else torch.device("cpu")


def _described(layout: Layout, device: torch.device, count: int) -> str:
    dtypes = ", ".join(f"{name} {dtype_name(dtype)}" for name, dtype in layout.dtypes)
    return f"{count} tensors on {device} ({dtypes})"


def _named(group: Group, index: int) -> str:
    return f"{group['param_names'][index]!r}, " if "param_names" in group else ""
