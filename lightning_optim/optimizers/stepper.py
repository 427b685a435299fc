"""Steps parameters by a rule: groups them into buckets, gives each to an engine, and keeps nothing else.

The stepper works on ``(rule, param_groups, state)`` and owns none of them, so that it serves our optimizers and
torch's own instances alike.
"""

from __future__ import annotations

import operator
import weakref
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_optim.engines.base import Bucket, Decision, Engine, Layout, Scalars, choose, dtype_name
from lightning_optim.engines.memory import aliased, in_order_of, is_dense, same_order
from lightning_optim.rules.policy import KAHAN_SLOT, Decay, Policy, Rounding, Update
from lightning_optim.rules.rule import Rule

Group = dict[str, Any]


class Method(Protocol):
    """What an optimizer class says about itself: see :class:`~lightning_optim.optimizers.base.RuleOptimizer`."""

    rule: Rule

    def flags(self, group: Group, p: Tensor, fresh: bool) -> dict[str, bool]:
        """Values of the rule's flags."""

    def decay(self, group: Group) -> Decay:
        """How weight decay is applied."""

    def scalars(self, group: Group) -> dict[str, float | Tensor]:
        """The numbers of a param group, by the rule's names."""


class Owner(Protocol):
    """What holds the parameters and the state: a ``torch.optim.Optimizer``."""

    param_groups: list[Group]
    state: Any


@dataclass(frozen=True)
class Options:
    """What holds for all parameters of one optimizer.

    Attributes:
        engine: Name of the engine, or ``"auto"``.
        rounding: See :class:`~lightning_optim.rules.policy.Policy`.
        state_dtype: Storage type of new slots; None: float32 (float64 for float64 weights).
        max_grad_norm: Clip the global norm of the gradients to this, inside the step; None: no clipping.
        seed: Of the noise of stochastic rounding.
    """

    engine: str = "auto"
    rounding: Rounding = "nearest"
    state_dtype: torch.dtype | None = None
    max_grad_norm: float | None = None
    seed: int = 0


@dataclass
class _Member:
    """A parameter that has a gradient at this step."""

    index: int  # among the gradients of this step
    param: Tensor
    row: int  # its param group
    id: int  # its number among all parameters of the optimizer
    fresh: bool  # it had no state before this step


@dataclass
class _Planned:
    """A bucket, its engine, and the members that fill it."""

    bucket: Bucket
    engine: Engine
    decision: Decision
    members: list[_Member]
    view: Callable[[Tensor], Tensor] | None
    params: list[Tensor]
    dtypes: dict[str, torch.dtype]  # as stored: complex where the layout has real views
    strides: list[tuple[int, ...]]
    checked: dict[str, list[weakref.ref[Tensor]]] = field(default_factory=dict)  # slots found in order


@dataclass(frozen=True)
class _Structure:
    """All that a plan depends on, apart from the slots; compared anew at every step."""

    params: list[int]
    sizes: list[int]
    absent: list[bool]
    dtypes: list[torch.dtype]
    strides: list[tuple[int, ...]]
    grad_dtypes: list[torch.dtype]
    grad_strides: list[tuple[int, ...] | None]
    static: list[tuple[Any, ...]]
    copies: list[torch.dtype] | None


make_update = lru_cache(maxsize=None)(Update)  # few distinct ones; each is traced once per process


class Stepper:
    """Applies one rule to the parameters of an optimizer.

    Args:
        owner: Has ``param_groups`` and ``state``.
        method: The rule, and how a param group's options map to its inputs.
        options: What holds for all groups.
        native_state: Create slots in the weight's dtype, as torch's own optimizers do.
    """

    def __init__(self, owner: Owner, method: Method, options: Options, *, native_state: bool = False) -> None:
        # Not a reference: a cycle would keep gigabytes of state alive until the next garbage collection.
        self.owner = weakref.proxy(owner)
        self.method = method
        self.options = options
        self.native_state = native_state
        self.grad_norm: Tensor | None = None
        self._structure: _Structure | None = None
        self._plan: list[_Planned] = []

    def step(self, grads: Mapping[Tensor, Tensor] | None = None, copies: Mapping[Tensor, Tensor] | None = None) -> None:
        """Update every parameter that has a gradient.

        Args:
            grads: Gradients by parameter; default: each parameter's ``grad``. They are only read.
            copies: For each parameter, a tensor of the same shape to which the new weight is written too.
        """
        params = [p for group in self.owner.param_groups for p in group["params"]]
        found = [p.grad for p in params] if grads is None else [grads.get(p) for p in params]
        gradients = [g for g in found if g is not None]
        if not gradients:
            return
        structure = self._describe(params, found, gradients, copies)
        if structure != self._structure or not self._fill(gradients, copies):
            self._structure = None  # a failure below must not leave a half-built plan behind
            members = self._members(found)
            self._prepare(members)
            self._plan = self._build(members, gradients, copies)
            self._fill(gradients, copies)
            # A first step may be special (SGD's dampening): with fresh members, the next step plans again.
            if not any(member.fresh for member in members):
                self._structure = structure
        table = self._table(gradients)
        for planned in self._plan:
            planned.engine.run(planned.bucket, table)
            planned.bucket.tensors = {}  # gradients and state are their owner's to free or to move

    def report(self) -> list[Decision]:
        """The engine of each bucket of the last step; before the first step, what it would be."""
        if not self._plan:
            params = [p for group in self.owner.param_groups for p in group["params"]]
            return [planned.decision for planned in self._build(self._members(params), params, None)]
        return [planned.decision for planned in self._plan]

    def slot_dtype(self, p: Tensor, slot: str) -> torch.dtype:
        """The storage type of a new slot of parameter ``p``."""
        if slot == KAHAN_SLOT or self.native_state:
            return p.dtype
        wide = p.dtype in (torch.float64, torch.complex128)
        real = self.options.state_dtype or (torch.float64 if wide else torch.float32)
        return real.to_complex() if p.is_complex() else real

    def slots(self, group: Group, p: Tensor) -> tuple[str, ...]:
        """Names of the slots that parameter ``p`` has."""
        return self._update(group, p, fresh=False, copy=False).slots

    def counts_steps(self) -> bool:
        """Whether the state has a ``step``."""
        return self.method.rule.counts_steps or self.options.rounding == "stochastic"

    # -- which parameters, and whether the plan still fits them -----------------------------------------------

    def _members(self, found: Sequence[Tensor | None]) -> list[_Member]:
        members: list[_Member] = []
        rows = [row for row, group in enumerate(self.owner.param_groups) for _ in group["params"]]
        params = [p for group in self.owner.param_groups for p in group["params"]]
        for number, (p, row, g) in enumerate(zip(params, rows, found, strict=True)):
            if g is not None:
                members.append(_Member(len(members), p, row, number, fresh=not self.owner.state.get(p)))
        return members

    def _describe(
        self,
        params: list[Tensor],
        found: Sequence[Tensor | None],
        gradients: list[Tensor],
        copies: Mapping[Tensor, Tensor] | None,
    ) -> _Structure:
        # This runs at every step: whole lists at a time, about 0.5 µs for each parameter in all.
        try:
            grad_strides: list[tuple[int, ...] | None] = [g.stride() for g in gradients]
        except RuntimeError:  # sparse tensors have none; planning refuses them by name
            grad_strides = [None] * len(gradients)
        return _Structure(
            params=list(map(id, params)),
            sizes=[len(group["params"]) for group in self.owner.param_groups],
            absent=[g is None for g in found],
            dtypes=[p.dtype for p in params],
            strides=[p.stride() for p in params],
            grad_dtypes=[g.dtype for g in gradients],
            grad_strides=grad_strides,
            static=[self._static(group) for group in self.owner.param_groups],
            copies=None if copies is None else [copies[p].dtype for p in params if p in copies],
        )

    def _static(self, group: Group) -> tuple[Any, ...]:
        """What of a group's options is compiled in, and may have been changed since the last step."""
        flags = self.method.flags(group, group["params"][0], False) if group["params"] else {}
        return (self.method.decay(group), group.get("maximize"), group.get("cautious"), *flags.values())

    # -- building the plan ------------------------------------------------------------------------------------

    def _update(self, group: Group, p: Tensor, *, fresh: bool, copy: bool) -> Update:
        flags = self.method.flags(group, p, fresh)
        rule = self.method.rule
        options = self.options
        low: tuple[str, ...] = ()
        if options.rounding == "stochastic":
            low = tuple(s for s in rule.slots(flags) if self._stored_dtype(p, s) == torch.bfloat16)
        policy = Policy(
            decay=self.method.decay(group),
            cautious=bool(group.get("cautious", False)),
            maximize=bool(group.get("maximize", False)),
            scaled=options.max_grad_norm is not None,
            rounding=options.rounding,
            weight_dtype=dtype_name(p.dtype),
            low_precision_slots=low,
            copy=copy,
        )
        return make_update(rule, policy, tuple(sorted(flags.items())))

    def _stored_dtype(self, p: Tensor, slot: str) -> torch.dtype:
        value = self.owner.state.get(p, {}).get(slot) if p in self.owner.state else None
        return value.dtype if isinstance(value, Tensor) else self.slot_dtype(p, slot)

    def _prepare(self, members: list[_Member]) -> None:
        """Create the state that is missing, and bring loaded state into the form that engines expect."""
        for member in members:
            p, state = member.param, self.owner.state[member.param]
            if self.counts_steps():
                step = state.get("step", 0.0)
                usable = (
                    isinstance(step, Tensor)
                    and step.dtype == torch.float32
                    and not (p.device.type == "cpu" and step.device.type != "cpu")
                )
                if not usable:
                    state["step"] = torch.tensor(float(step), dtype=torch.float32)
            for slot in self.slots(self.owner.param_groups[member.row], p):
                value = state.get(slot)
                if value is None:
                    state[slot] = torch.zeros_like(
                        p, dtype=self.slot_dtype(p, slot), memory_format=torch.preserve_format
                    )
                elif is_dense(p) and not same_order(value, p):
                    state[slot] = in_order_of(value, p)

    def _build(
        self, members: list[_Member], gradients: Sequence[Tensor], copies: Mapping[Tensor, Tensor] | None
    ) -> list[_Planned]:
        same: dict[tuple[Any, ...], list[_Member]] = {}
        for member, g in zip(members, gradients, strict=True):
            p, group = member.param, self.owner.param_groups[member.row]
            _check_gradient(member, g)
            update = self._update(group, p, fresh=member.fresh, copy=copies is not None)
            dtypes = {"p": p.dtype, "g": g.dtype}
            dtypes.update({slot: self._stored_dtype(p, slot) for slot in update.slots})
            if copies is not None:
                dtypes["copy"] = copies[p].dtype
            view = _view(p, update)
            layout = Layout(
                math=torch.float64 if p.dtype in (torch.float64, torch.complex128) else torch.float32,
                dtypes=tuple((name, dtype.to_real()) for name, dtype in dtypes.items()),
            )
            dense = is_dense(p if view is not _local else view(p))
            key = (update, layout, p.device, dense, view, tuple(dtypes.items()))
            same.setdefault(key, []).append(member)
        plan = []
        for (update, layout, device, dense, view, stored), bucket_members in same.items():
            weights = [view(m.param) if view else m.param for m in bucket_members]
            bucket = Bucket(
                update=update,
                layout=layout,
                device=device,
                tensors={"p": weights},
                steps=None,
                rows=array("i", [m.row for m in bucket_members]),
                ids=array("i", [m.id for m in bucket_members]),
                sizes=tuple(p.numel() for p in weights),
                dense=dense,
                aliased=aliased(weights),
                label=_label(update, layout, device, len(bucket_members)),
            )
            engine, decision = choose(bucket, self.options.engine)
            params, strides = [m.param for m in bucket_members], [p.stride() for p in weights]
            plan.append(_Planned(bucket, engine, decision, bucket_members, view, params, dict(stored), strides))
        return plan

    # -- filling it, every step -------------------------------------------------------------------------------

    def _fill(self, gradients: list[Tensor], copies: Mapping[Tensor, Tensor] | None) -> bool:
        """Gather this step's tensors; False if a slot no longer is what the plan was made for."""
        state = self.owner.state
        for planned in self._plan:
            bucket, view = planned.bucket, planned.view
            states = [state[p] for p in planned.params]
            tensors = {"p": planned.params, "g": [gradients[m.index] for m in planned.members]}
            try:
                tensors.update({slot: [s[slot] for s in states] for slot in bucket.update.slots})
                steps = [s["step"] for s in states] if "step" in bucket.update.program.scalars else None
            except KeyError:
                return False
            if not self._slots_in_order(planned, tensors):
                return False
            if copies is not None:
                tensors["copy"] = [copies[p] for p in planned.params]
            if view is not None:
                tensors = {name: [view(t) for t in column] for name, column in tensors.items()}
            if bucket.dense and [g.stride() for g in tensors["g"]] != planned.strides:
                tensors["g"] = [in_order_of(g, p) for g, p in zip(tensors["g"], tensors["p"], strict=True)]
            bucket.tensors, bucket.steps = tensors, steps
        return True

    @staticmethod
    def _slots_in_order(planned: _Planned, tensors: Mapping[str, list[Tensor]]) -> bool:
        """Whether every slot has the type that was planned and lies in memory as its parameter does."""
        for slot in planned.bucket.update.slots:
            column, known = tensors[slot], planned.checked.get(slot, ())
            if len(known) == len(column) and all(map(operator.is_, [ref() for ref in known], column)):
                continue  # the very tensors of the last step
            dtype = planned.dtypes[slot]
            for tensor, p in zip(column, planned.params, strict=True):
                if tensor.dtype != dtype or (planned.bucket.dense and not same_order(tensor, p)):
                    return False
            planned.checked[slot] = [weakref.ref(tensor) for tensor in column]
        return True

    def _table(self, gradients: list[Tensor]) -> list[Scalars]:
        """The scalars of each param group."""
        common: dict[str, float | Tensor] = {"seed": float(self.options.seed)}
        if self.options.max_grad_norm is not None:
            common["grad_scale"] = self._clip_coefficient(gradients, self.options.max_grad_norm)
        return [{**self.method.scalars(group), **common} for group in self.owner.param_groups]

    def _clip_coefficient(self, gradients: list[Tensor], max_norm: float) -> float | Tensor:
        """What to multiply gradients by, as ``torch.nn.utils.clip_grad_norm_`` does: NaN if the norm is."""
        if any(not isinstance(g, torch.nn.Parameter) and type(g) is not Tensor for g in gradients):
            total = torch.nn.utils.get_total_norm(gradients)
            self.grad_norm = total.full_tensor() if hasattr(total, "full_tensor") else total
        else:
            columns: dict[torch.device, list[Tensor]] = {}
            for g in gradients:
                columns.setdefault(g.device, []).append(torch.view_as_real(g) if g.is_complex() else g)
            engines = {planned.bucket.device: planned.engine for planned in self._plan}
            first = gradients[0].device
            parts = [engines[device].sum_of_squares(column).to(first) for device, column in columns.items()]
            self.grad_norm = torch.stack(parts).sum().sqrt()
        coefficient = (max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        return coefficient.item() if coefficient.device.type == "cpu" else coefficient.float()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _view(p: Tensor, update: Update) -> Callable[[Tensor], Tensor] | None:
    """How an engine must look at a parameter's tensors."""
    if p.is_complex():
        return torch.view_as_real  # real and imaginary parts are updated as two numbers, as in torch.optim
    if hasattr(p, "to_local") and not update.program.reduces:
        return _local  # element-wise: each rank updates its shard; a reduction needs the DTensor's own operators
    return None


def _label(update: Update, layout: Layout, device: torch.device, count: int) -> str:
    dtypes = ", ".join(f"{name} {dtype_name(dtype)}" for name, dtype in layout.dtypes)
    return f"{update.rule.name}, {count} tensors on {device} ({dtypes})"


def _check_gradient(member: _Member, g: Tensor) -> None:
    if g.layout != torch.strided:
        raise RuntimeError(
            f"parameter {member.id} (shape {tuple(member.param.shape)}) has a gradient of layout {g.layout}; valid: "
            "dense gradients (use sparse=False in nn.Embedding), or torch.optim.SparseAdam for this parameter"
        )
    if g.shape != member.param.shape or g.device != member.param.device:
        raise RuntimeError(
            f"parameter {member.id} has shape {tuple(member.param.shape)} on {member.param.device}, its gradient "
            f"{tuple(g.shape)} on {g.device}"
        )
