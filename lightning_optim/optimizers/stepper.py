"""Steps parameters by a rule: gathers what each bucket needs, lets its engine run, and keeps nothing else.

The stepper works on ``(rule, param_groups, state)`` and owns none of them, so that it serves our optimizers and
torch's own instances alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.base import Bucket, Decision, Scalars
from lightning_optim.engines.scaling import LossScale, Scaling, needs_squares
from lightning_optim.optimizers.filling import fill
from lightning_optim.optimizers.plan import Group, Method, Options, Owner, Part, Planned, Planner
from lightning_optim.optimizers.shards import LocalSquares, local, total_squares
from lightning_optim.optimizers.undo import UndoBuffers
from lightning_optim.warnings import warn_once

# Called for every parameter at every step: `map` over these is half the time of a comprehension.
_grad, _is_neg = attrgetter("grad"), Tensor.is_neg


#: Plans that are kept: models with experts, or adversaries, alternate between a few sets of gradients, and planning
#: costs milliseconds where a step costs a third of one (200 tensors).
PLANS = 4

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
    grad_placements: list[Any]
    static: list[tuple[Any, ...]]
    copies: bool
    scaled: bool
    undo: bool


@dataclass(frozen=True)
class _Past:
    """A step that can be taken back: what it has written, with which states, and those that it has made."""

    written: list[Planned]
    states: dict[Tensor, Any]
    new: list[tuple[Tensor, Any]]
    undo: UndoBuffers


class Stepper:
    """Applies one rule to the parameters of an optimizer.

    Args:
        owner: Has ``param_groups`` and ``state``.
        method: The rule, and how a param group's options map to its inputs.
        options: What holds for all groups.
        native_state: Create slots in the weight's dtype, as torch's own optimizers do.
        part: What of an update is done: see :data:`~lightning_optim.optimizers.plan.Part`. Directions are written to
            the ``copies``.
        selects: Tells the param groups that are stepped; default: all.
    """

    def __init__(
        self,
        owner: Owner,
        method: Method,
        options: Options,
        *,
        native_state: bool = False,
        part: Part = "all",
        selects: Callable[[Group], bool] | None = None,
    ) -> None:
        # Not a reference: a cycle would keep gigabytes of state alive until the next garbage collection.
        self.owner: Owner = weakref.proxy(owner)
        self.planner = Planner(self.owner, method, options, native_state, part)
        self._selects = selects
        self.scaling: Scaling | None = None
        self._plan: list[Planned] = []
        self._plans: list[tuple[_Structure, list[Planned]]] = []  # the last ones, latest first
        self._fresh: list[Tensor] = []
        self._new: list[tuple[Tensor, Any]] = []  # with the state that a plan has made for them
        self._written: list[Planned] = []  # at the last step
        self._undo: UndoBuffers | None = None
        #: What can be taken back; not the plan's, as a norm may be planned between a step and its undoing.
        self._past: _Past | None = None
        self._captured: Any = None

    def step(
        self,
        grads: Mapping[Tensor, Tensor] | None = None,
        copies: Mapping[Tensor, Tensor] | None = None,
        *,
        loss: LossScale | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        """Update every parameter that has a gradient.

        Args:
            grads: Gradients by parameter; default: each parameter's ``grad``. They are only read.
            copies: For each parameter, a tensor of the same shape to which the new weight is written too.
            loss: What the gradients are to be divided by, and whether the step is to be left out.
            max_grad_norm: Clip the gradients' global norm to this; default: the options' ``max_grad_norm``.

        Raises:
            RuntimeError: A gradient that is sparse, or of another shape or device than its parameter.
        """
        max_norm = self.planner.options.max_grad_norm if max_grad_norm is None else max_grad_norm
        scaled = max_norm is not None or (loss is not None and loss.scale is not None)
        try:
            if not self.plan(grads, copies, scaled=scaled):
                self.scaling = None
            elif self.planner.options.capture and not self._fresh and self._can_capture(grads):
                self._run_captured(max_norm, loss)
            elif max_norm is None and loss is None:
                self.run(None)
            else:
                self.run(Scaling(max_norm, loss, self.squares() if needs_squares(max_norm, loss) else None))
        except BaseException:
            self._let_go()
            self.abandon()
            raise

    def plan(
        self,
        grads: Mapping[Tensor, Tensor] | None = None,
        copies: Mapping[Tensor, Tensor] | None = None,
        *,
        scaled: bool = False,
        undo: UndoBuffers | None = None,
    ) -> bool:
        """Gather what the next :meth:`run` works on; the first half of :meth:`step`.

        Args:
            grads: As for :meth:`step`.
            copies: As for :meth:`step`.
            scaled: Whether gradients will be unscaled or clipped.
            undo: Where old values are kept, so that :meth:`undo` can take the step back.

        Returns:
            Whether any parameter has a gradient.
        """
        self.abandon()
        self._fresh, self._written, self._undo = [], [], undo
        params = [p for group in self.owner.param_groups for p in group["params"]]
        found = self._selected(list(map(_grad, params)) if grads is None else [grads.get(p) for p in params])
        gradients = [g for g in found if g is not None]
        if not gradients:
            return False
        structure = self._describe(params, found, gradients, copies is not None, scaled)
        if self._knows(structure, gradients, copies):
            return True
        # Plans for other parameters would keep these alive.
        self._plans = [pair for pair in self._plans if pair[0].params == structure.params][: PLANS - 1]
        members = self.planner.members(found)
        self._new = [(p, self.owner.state[p]) for p in self.planner.prepare(members)]
        self._plan = self.planner.build(members, gradients, copies, scaled, undo is not None)
        if not self._fill(gradients, copies):
            raise ValueError(
                "a copy must have its parameter's shape and device, and its elements in the same order in memory"
            )
        # A first step may be special (SGD's dampening): with fresh members, the next step plans again.
        self._fresh = [member.param for member in members if member.fresh]
        if not self._fresh:
            self._plans.insert(0, (structure, self._plan))
        return True

    def run(self, scaling: Scaling | None) -> None:
        """Let every bucket's engine run what is planned; the second half of :meth:`step`."""
        self.scaling = scaling
        self._written = []
        self._past = None
        if self._undo is not None:
            states = {p: self.owner.state.get(p) for planned in self._plan for p in planned.params}
            self._past = _Past(self._written, states, self._new, self._undo)
        # A host that must know waits for the device once; the engines that decide on the device come to the same.
        on_device = all(planned.engine.controls_on_device for planned in self._plan)
        waits = scaling is not None and not (on_device and not self._fresh)
        skip = waits and scaling is not None and scaling.skip()
        factor = scaling.factor() if waits and scaling is not None and not skip else None
        try:
            for planned in self._plan:
                bucket = planned.bucket
                if planned.engine.controls_on_device:
                    planned.engine.run(bucket, self._table(bucket, None), scaling)
                elif not skip:
                    planned.engine.run(bucket, self._table(bucket, factor))
                if not skip:
                    self._written.append(planned)
        finally:
            self._let_go()
        self._new = []
        if skip:
            for p in self._fresh:  # their first step is still to come
                self.owner.state.pop(p, None)

    @property
    def has_written(self) -> bool:
        """Whether what was last planned has been run."""
        return bool(self._written)

    def abandon(self) -> None:
        """Forget what was planned and not run: parameters that had no state have none."""
        if self._new:
            written = {id(p) for planned in self._written for p in planned.params}
            self._forget([(p, made) for p, made in self._new if id(p) not in written])
            self._new = []

    def undo(self) -> None:
        """Take the last step back, which was planned with ``undo``: every bit is as before it.

        Raises:
            RuntimeError: There is no such step.
        """
        if self._past is None:
            raise RuntimeError("there is no step to take back: it must be planned with undo=UndoBuffers()")
        past, self._past = self._past, None
        for planned in reversed(past.written):  # weights that share memory were updated one after the other
            slots = planned.bucket.update.slots
            for p in reversed(planned.params):
                past.undo.give_back(p, "p", p)
                state = past.states[p]
                if state is None or self.owner.state.get(p) is not state:
                    continue  # another was loaded since
                for slot in slots:
                    past.undo.give_back(p, slot, state[slot])
                if "step" in planned.bucket.update.program.scalars:
                    state["step"] -= 1
        self._forget(past.new)

    def _forget(self, new: list[tuple[Tensor, Any]]) -> None:
        """Drop states that a plan has made: first steps are still to come. What was loaded since is another's."""
        for p, made in new:
            if self.owner.state.get(p) is made:
                self.owner.state.pop(p)

    def _let_go(self) -> None:
        """After a step, or a failed one, tensors are their owner's to free or to move."""
        for planned in self._written:
            bucket = planned.bucket
            if planned.engine.uses_addresses and bucket.tensors:
                # Behind torch's back: a later backward through an old weight must fail as after any in-place update.
                torch.autograd.graph.increment_version([*bucket.tensors["p"], *bucket.tensors.get("copy", ())])
        for planned in self._plan:
            planned.bucket.tensors, planned.bucket.steps = {}, None

    def _can_capture(self, grads: Mapping[Tensor, Tensor] | None) -> bool:
        """Whether the planned step can be recorded as a CUDA graph; warns if not.

        Raises:
            RuntimeError: A parameter has no gradient.
        """
        from lightning_optim.engines.triton.graph import CapturedSteps  # only who captures needs it

        reason = CapturedSteps.rejects([(planned.engine, planned.bucket) for planned in self._plan])
        if reason is None and any(planned.shards for planned in self._plan):
            reason = "the norm of sharded gradients needs other processes"
        if reason is not None:
            warn_once(f"lightning-optim: the step is not captured as a CUDA graph ({reason})", key=f"capture: {reason}")
            return False
        absent = [
            f"{_label(group, index)}"
            for group in self.owner.param_groups
            for index, p in enumerate(group["params"])
            if p.requires_grad and (p.grad if grads is None else grads.get(p)) is None
        ]
        if absent:
            raise RuntimeError(
                f"a captured step needs a gradient for every parameter; there is none for {', '.join(absent[:5])}"
                f"{' and others' if len(absent) > 5 else ''}; valid: requires_grad=False for them, or capture=False"
            )
        if self._captured is None:
            self._captured = CapturedSteps()
        return True

    def _run_captured(self, max_norm: float | None, loss: LossScale | None) -> None:
        work: list[Any] = [(planned.engine, planned.bucket) for planned in self._plan]
        self._written = []
        self.scaling = self._captured.run(work, lambda bucket: self._table(bucket, None), max_norm, loss)
        self._written, self._new = list(self._plan), []
        self._let_go()

    def report(self, *, scaled: bool = False) -> list[Decision]:
        """The engine of each bucket of the last step; before the first step, what it would be.

        Args:
            scaled: Whether gradients are going to be unscaled or clipped in the step.
        """
        if not self._plan:
            params = [p for group in self.owner.param_groups for p in group["params"]]
            scaled = scaled or self.planner.options.max_grad_norm is not None
            chosen = self._selected(params)
            copies = {p: local(p) for p in params} if self.planner.part == "direction" else None
            weights = [p for p in chosen if p is not None]
            plan = self.planner.build(self.planner.members(chosen), weights, copies, scaled)
            return [planned.decision for planned in plan]
        return [planned.decision for planned in self._plan]

    def planner_of(self, group: Group) -> Planner:
        """What knows the state of a param group's parameters."""
        del group
        return self.planner

    def number_parameters(self, numbers: Sequence[int]) -> None:
        """Say which number each parameter has, for the noise of stochastic rounding; default: as they are counted."""
        self.planner.numbers = numbers

    def _selected(self, found: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Of one value for each parameter, those of the param groups that are stepped."""
        if self._selects is None:
            return found
        chosen = [self._selects(group) for group in self.owner.param_groups for _ in group["params"]]
        return [value if mine else None for value, mine in zip(found, chosen, strict=True)]

    def _describe(
        self,
        params: list[Tensor],
        found: Sequence[Tensor | None],
        gradients: list[Tensor],
        copies: bool,
        scaled: bool,
    ) -> _Structure:
        groups = self.owner.param_groups
        types = set(map(type, gradients))
        return _Structure(
            params=list(map(id, params)),
            sizes=[len(group["params"]) for group in groups],
            absent=[g is None for g in found],
            grad_types=types,
            grad_lazy=any(map(_is_neg, gradients)),
            grad_placements=[getattr(g, "placements", None) for g in gradients] if types != {Tensor} else [],
            static=list(map(self.planner.static, groups)),
            copies=copies,
            scaled=scaled,
            undo=self._undo is not None,
        )

    def _knows(self, structure: _Structure, gradients: list[Tensor], copies: Mapping[Tensor, Tensor] | None) -> bool:
        """Whether there is a plan for this structure and these tensors, which is filled then."""
        for index, (known, plan) in enumerate(self._plans):
            if known == structure:
                self._plan = plan
                del self._plans[index]
                if self._fill(gradients, copies):
                    self._plans.insert(0, (known, plan))
                    return True
                break
        return False

    def _fill(self, gradients: list[Tensor], copies: Mapping[Tensor, Tensor] | None) -> bool:
        """Gather this step's tensors; False if a tensor no longer is what the plan was made for."""
        return all(fill(planned, self.owner.state, gradients, copies, self._undo) for planned in self._plan)

    def _table(self, bucket: Bucket, factor: Tensor | None) -> list[Scalars]:
        """The scalars of each param group."""
        common: dict[str, float | Tensor] = {"seed": NOISE_SEED}
        if factor is not None:
            # On a device it stays there: reading it would wait for the device.
            on_cpu = bucket.device.type == "cpu"
            common["grad_scale"] = factor.item() if on_cpu else factor.to(bucket.device, bucket.layout.math)
        return [{**self.planner.method.scalars(group), **common} for group in self.owner.param_groups]

    def squares(self) -> Tensor:
        """The sum of squares of all gradients, in parts, on the first one's device: of all shards, if they are such."""
        return total_squares(self.local_squares())

    def local_squares(self) -> LocalSquares:
        """The sums of squares of what this process has of the gradients, by what they are divided over."""
        sums: LocalSquares = {}
        for planned in self._plan:
            sums.setdefault(planned.shards, []).append(planned.engine.sum_of_squares(planned.bucket))
        return sums


def _label(group: dict[str, Any], index: int) -> str:
    return (
        repr(group["param_names"][index]) if "param_names" in group else f"shape {tuple(group['params'][index].shape)}"
    )
