"""Steps parameters by a rule: gathers what each bucket needs, lets its engine run, and keeps nothing else.

The stepper works on ``(rule, param_groups, state)`` and owns none of them, so that it serves our optimizers and
torch's own instances alike.
"""

from __future__ import annotations

import operator
import weakref
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.base import Bucket, Decision, Scalars
from lightning_optim.engines.memory import Reading, aliased, form, in_order_of, is_lazy, is_plain, same_order
from lightning_optim.optimizers.plan import Method, Options, Owner, Planned, Planner

# Called for every parameter at every step: `map` over these is half the time of a comprehension.
_grad, _is_neg = attrgetter("grad"), Tensor.is_neg


#: Of the noise of stochastic rounding. The same in all processes: replicas must round alike.
NOISE_SEED = 0.0


@dataclass(frozen=True)
class _Structure:
    """What a plan depends on and a step may change, apart from what filling reads of each tensor."""

    params: list[int]
    sizes: list[int]
    absent: list[bool]
    grad_types: set[type]
    grad_lazy: bool
    static: list[tuple[Any, ...]]
    copies: bool


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
        self.owner: Owner = weakref.proxy(owner)
        self.planner = Planner(self.owner, method, options, native_state)
        self.grad_norm: Tensor | None = None
        self._structure: _Structure | None = None
        self._plan: list[Planned] = []

    def step(self, grads: Mapping[Tensor, Tensor] | None = None, copies: Mapping[Tensor, Tensor] | None = None) -> None:
        """Update every parameter that has a gradient.

        Args:
            grads: Gradients by parameter; default: each parameter's ``grad``. They are only read.
            copies: For each parameter, a tensor of the same shape to which the new weight is written too.

        Raises:
            RuntimeError: A gradient that is sparse, or of another shape or device than its parameter.
        """
        params = [p for group in self.owner.param_groups for p in group["params"]]
        found = list(map(_grad, params)) if grads is None else [grads.get(p) for p in params]
        gradients = [g for g in found if g is not None]
        self.grad_norm = None
        if not gradients:
            return
        structure = self._describe(params, found, gradients, copies is not None)
        if structure != self._structure or not self._fill(gradients, copies):
            self._structure = None  # a failure below must not leave a half-built plan behind
            members = self.planner.members(found)
            self.planner.prepare(members)
            self._plan = self.planner.build(members, gradients, copies)
            if not self._fill(gradients, copies):
                raise ValueError(
                    "a copy must have its parameter's shape and device, and its elements in the same order in memory"
                )
            # A first step may be special (SGD's dampening): with fresh members, the next step plans again.
            if not any(member.fresh for member in members):
                self._structure = structure
        coefficient = self._clip_coefficient(gradients)
        for planned in self._plan:
            planned.engine.run(planned.bucket, self._table(planned.bucket, coefficient))
            if planned.engine.uses_addresses:
                # Behind torch's back: a later backward through an old weight must fail as after any in-place update.
                written = planned.bucket.tensors
                torch.autograd.graph.increment_version([*written["p"], *written.get("copy", ())])
            planned.bucket.tensors, planned.bucket.steps = {}, None  # their owner's to free or to move

    def report(self) -> list[Decision]:
        """The engine of each bucket of the last step; before the first step, what it would be."""
        if not self._plan:
            params = [p for group in self.owner.param_groups for p in group["params"]]
            plan = self.planner.build(self.planner.members(params), params, None)
            return [planned.decision for planned in plan]
        return [planned.decision for planned in self._plan]

    def _describe(
        self, params: list[Tensor], found: Sequence[Tensor | None], gradients: list[Tensor], copies: bool
    ) -> _Structure:
        groups = self.owner.param_groups
        return _Structure(
            params=list(map(id, params)),
            sizes=[len(group["params"]) for group in groups],
            absent=[g is None for g in found],
            grad_types=set(map(type, gradients)),
            grad_lazy=any(map(_is_neg, gradients)),
            static=list(map(self.planner.static, groups)),
            copies=copies,
        )

    def _fill(self, gradients: list[Tensor], copies: Mapping[Tensor, Tensor] | None) -> bool:
        """Gather this step's tensors; False if a tensor no longer is what the plan was made for."""
        state = self.owner.state
        for planned in self._plan:
            update = planned.bucket.update
            states = [state[p] for p in planned.params]
            try:
                kept = {slot: [s[slot] for s in states] for slot in update.slots}
                steps = [s["step"] for s in states] if "step" in update.program.scalars else []
            except KeyError:
                return False
            if copies is not None:
                kept["copy"] = [copies[p] for p in planned.params]
            tensors = {"p": planned.params, "g": [gradients[i] for i in planned.sources], **kept}
            try:
                if planned.view is not None:
                    tensors = {name: list(map(planned.view, column)) for name, column in tensors.items()}
                if planned.reorder:
                    tensors["g"] = list(map(in_order_of, tensors["g"], tensors["p"]))
                reading = planned.engine.read([*chain.from_iterable(tensors.values()), *steps])
            except (RuntimeError, TypeError, AttributeError):  # no tensor at all, or one of quite another kind
                return False
            if not _as_planned(planned, tensors, steps, [*chain.from_iterable(kept.values()), *steps], reading):
                return False
            bucket = planned.bucket
            bucket.tensors, bucket.steps = tensors, steps if "step" in update.program.scalars else None
            if planned.engine.uses_addresses:
                end = len(bucket) * len(tensors)
                bucket.addresses = reading.addresses[:end]
                bucket.step_addresses = None if bucket.steps is None else reading.addresses[end:]
        return True

    def _table(self, bucket: Bucket, coefficient: Tensor | None) -> list[Scalars]:
        """The scalars of each param group."""
        common: dict[str, float | Tensor] = {"seed": NOISE_SEED}
        if coefficient is not None:
            # On a device it stays there: reading it would wait for the device.
            local = coefficient.to(bucket.device, bucket.layout.math if bucket.device.type != "cpu" else None)
            common["grad_scale"] = local.item() if local.device.type == "cpu" else local
        return [{**self.planner.method.scalars(group), **common} for group in self.owner.param_groups]

    def _clip_coefficient(self, gradients: list[Tensor]) -> Tensor | None:
        """What to multiply gradients by, as ``torch.nn.utils.clip_grad_norm_`` does: NaN if the norm is."""
        max_norm = self.planner.options.max_grad_norm
        if max_norm is None:
            return None
        if not all(map(is_plain, gradients)):
            total = torch.nn.utils.get_total_norm(gradients)
            self.grad_norm = total.full_tensor() if hasattr(total, "full_tensor") else total
        else:
            columns: dict[torch.device, list[Tensor]] = {}
            for g in gradients:
                columns.setdefault(g.device, []).append(torch.view_as_real(g.resolve_conj()) if g.is_complex() else g)
            engines = {planned.bucket.device: planned.engine for planned in self._plan}
            first = gradients[0].device
            parts = [engines[device].sum_of_squares(column).to(first) for device, column in columns.items()]
            self.grad_norm = torch.stack(parts).sum().sqrt()
        return (max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)


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
        if planned.engine.uses_addresses and step.device.type != "cpu":
            return False
    planned.kept = list(map(weakref.ref, kept))
    planned.reading = Reading(here, reading.forms)
    return True
