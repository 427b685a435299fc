"""Steps parameters by a rule: gathers what each bucket needs, lets its engine run, and keeps nothing else.

The stepper works on ``(rule, param_groups, state)`` and owns none of them, so that it serves our optimizers and
torch's own instances alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy as is_uninitialized

from lightning_optim.engines.base import Bucket, Decision, Scalars
from lightning_optim.engines.progress import IncompleteStepError, Progress, carry_through
from lightning_optim.engines.scaling import LossScale, Scaling, needs_squares
from lightning_optim.stepping.capturing import can_capture
from lightning_optim.stepping.filling import fill
from lightning_optim.stepping.meeting import Meeting
from lightning_optim.stepping.method import Group, Inputs, Method, Options, Owner, Part
from lightning_optim.stepping.new_state import NewState
from lightning_optim.stepping.observing import Observed
from lightning_optim.stepping.past import Past
from lightning_optim.stepping.plan import Planned, Planner
from lightning_optim.stepping.preparing import prepare
from lightning_optim.stepping.shards import LocalSquares, local, total_squares
from lightning_optim.stepping.structure import Structure, describe
from lightning_optim.stepping.undo import UndoBuffers

# Called for every parameter at every step: `map` over this is half the time of a comprehension.
_grad = attrgetter("grad")

#: Plans that are kept: models with experts, or adversaries, alternate between a few sets of gradients, and planning
#: costs milliseconds where a step costs a third of one (200 tensors).
PLANS = 4

#: The seed of stochastic rounding's noise. It is the same in all processes: replicas must round alike.
NOISE_SEED = 0.0


class Stepper:
    """Applies one rule to the parameters of an optimizer.

    Args:
        owner: Has ``param_groups`` and ``state``.
        method: The rule, and how a param group's options map to its inputs.
        options: The options that hold for all groups.
        native_state: Create slots in the weight's dtype, as torch's own optimizers do.
        part: Which part of an update is done: see :data:`~lightning_optim.stepping.method.Part`. Directions are
            written to the ``copies``.
        selects: Whether a parameter of a param group is stepped; default: all are.
    """

    def __init__(
        self,
        owner: Owner,
        method: Method,
        options: Options,
        *,
        native_state: bool = False,
        part: Part = "all",
        selects: Callable[[Group, Tensor], bool] | None = None,
    ) -> None:
        # Not a reference: a cycle would keep gigabytes of state alive until the next garbage collection.
        self.owner: Owner = weakref.proxy(owner)
        self.planner = Planner(self.owner, method, options, native_state, part)
        self._selects = selects
        self.scaling: Scaling | None = None
        self._plan: list[Planned] = []
        self._plans: list[tuple[Structure, list[Planned]]] = []  # the last ones, latest first
        self._fresh = False  # whether a first step is planned
        self._new = NewState()
        self._progress: list[Progress] = []  # one for each bucket of the last plan, once it runs
        self._skip, self._tables = False, list[list[Scalars]]()  # of the running step
        self._inputs: Inputs = {}
        self._meeting: Meeting | None = None  # of the running step, if its parameters meet
        self.observed = Observed()
        self._undo: UndoBuffers | None = None
        #: The step that can be undone; it is no part of the plan, as a norm may be planned between step and undo.
        self._past: Past | None = None
        self._captured: Any = None

    def step(
        self,
        grads: Mapping[Tensor, Tensor] | None = None,
        copies: Mapping[Tensor, Tensor] | None = None,
        *,
        inputs: Inputs | None = None,
        loss: LossScale | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        """Update every parameter that has a gradient.

        Args:
            grads: Gradients by parameter; default: each parameter's ``grad``. They are only read.
            copies: For each parameter, a tensor of the same shape to which the new weight is written too.
            inputs: What the rule needs besides gradients: for each name and parameter, a tensor of its shape.
            loss: What the gradients are to be divided by, and whether the step is to be left out.
            max_grad_norm: Clip the gradients' global norm to this; default: the options' ``max_grad_norm``.

        Raises:
            RuntimeError: A gradient that is sparse, or of another shape or device than its parameter; or an input that
                the rule needs is not there.
        """
        max_norm = self.planner.options.max_grad_norm if max_grad_norm is None else max_grad_norm
        scaled = max_norm is not None or (loss is not None and loss.scale is not None)
        try:
            if not self.plan(grads, copies, inputs=inputs, scaled=scaled):
                self.scaling = None
            elif self.planner.options.capture and not self._fresh and self._can_capture(grads):
                self._run_captured(max_norm, loss)
            elif max_norm is None and loss is None:
                self.run(None)
            else:
                self.run(Scaling(max_norm, loss, self.squares() if needs_squares(max_norm, loss) else None))
        except BaseException:
            self.abandon()
            self._let_go()
            raise

    def plan(
        self,
        grads: Mapping[Tensor, Tensor] | None = None,
        copies: Mapping[Tensor, Tensor] | None = None,
        *,
        inputs: Inputs | None = None,
        scaled: bool = False,
        undo: UndoBuffers | None = None,
    ) -> bool:
        """Gather what the next :meth:`run` works on; the first half of :meth:`step`.

        Args:
            grads: As for :meth:`step`.
            copies: As for :meth:`step`.
            inputs: As for :meth:`step`.
            scaled: Whether gradients will be unscaled or clipped.
            undo: Where old values are kept, so that :meth:`undo` can undo the step.

        Returns:
            Whether any parameter has a gradient.
        """
        self.abandon()
        self._fresh, self._undo, self._progress, self._skip = False, undo, [], False
        self._inputs, self._meeting = inputs or {}, None
        params = [p for group in self.owner.param_groups for p in group["params"]]
        found = self._selected(list(map(_grad, params)) if grads is None else [grads.get(p) for p in params])
        gradients = [g for g in found if g is not None]
        if not gradients:
            return False
        structure = describe(
            self.planner, params, found, gradients, copies=copies is not None, scaled=scaled, undo=undo is not None
        )
        if self._knows(structure, gradients, copies):
            return True
        # Plans for other parameters would keep these alive.
        self._plans = [pair for pair in self._plans if pair[0].params == structure.params][: PLANS - 1]
        try:
            self._make_plan(found, gradients, copies, scaled)
        except BaseException:
            self.abandon()
            raise
        # A first step may be special (SGD's dampening): with fresh members, the next step plans again.
        if not self._fresh:
            self._plans.insert(0, (structure, self._plan))
        return True

    def _make_plan(
        self,
        found: Sequence[Tensor | None],
        gradients: list[Tensor],
        copies: Mapping[Tensor, Tensor] | None,
        scaled: bool,
    ) -> None:
        members = self.planner.members(found)
        self._fresh = any(member.fresh for member in members)
        prepare(self.planner, members, self._new)
        undo = self._undo is not None
        self._plan = self.planner.build(members, gradients, copies, scaled, undo, self._new, self._inputs)
        if not self._fill(gradients, copies):
            if copies is None:
                raise RuntimeError(
                    "a parameter's tensors have changed while their step was planned: by another thread?"
                )
            raise ValueError(
                "a copy must have its parameter's shape and device, and its elements in the same order in memory"
            )

    def run(self, scaling: Scaling | None) -> None:
        """Let every bucket's engine run what is planned; the second half of :meth:`step`.

        An exception comes either before anything is written or after everything is: :attr:`has_written` tells which.

        Raises:
            IncompleteStepError: Only a part could be written.
        """
        try:
            self._start(scaling)
            carry_through(self._go_on, lambda: self._has_begun)
        except IncompleteStepError:
            self._undo = None  # not all of the old values are kept
            raise
        finally:
            self._end()

    @property
    def has_written(self) -> bool:
        """Whether what was last planned has been run, and has changed weights or state."""
        return self._has_begun and not self._skip

    @property
    def _has_begun(self) -> bool:
        return any(progress.begun for progress in self._progress)

    def _start(self, scaling: Scaling | None) -> None:
        """Find all that a run needs, so that little is left to fail once it has begun to write."""
        self.scaling, self._past = scaling, None
        self._progress = [Progress() for _ in self._plan]
        for planned, progress in zip(self._plan, self._progress, strict=True):
            planned.bucket.progress = progress
        # If the host must know, it waits for the device once; engines that decide on the device reach the same result.
        on_device = all(planned.engine.controls_on_device for planned in self._plan)
        waits = scaling is not None and not (on_device and not self._fresh)
        self._skip = waits and scaling is not None and scaling.skip()
        factor = scaling.factor() if waits and scaling is not None and not self._skip else None
        self._tables = [
            self._table(planned.bucket, None if planned.engine.controls_on_device else factor) for planned in self._plan
        ]
        if not self._skip:
            if self._plan and self._plan[0].bucket.update.meets:
                self._meeting = Meeting(self.planner, self._plan, self._tables, scaling)
            self._count_versions()

    def _go_on(self) -> None:
        """Run all buckets, each from where it is."""
        for planned, table in zip(self._plan, self._tables, strict=True):
            if planned.engine.controls_on_device:
                planned.engine.run(planned.bucket, table, self.scaling)
            elif not self._skip:
                planned.engine.run(planned.bucket, table)
        if self._meeting is not None:
            self._meeting.progress.finish()

    def _end(self) -> None:
        """After a run, also a failed one: keep what an undo needs, and the state that is in use now."""
        if self._undo is not None:
            begun = [planned for planned in self._plan if (p := planned.bucket.progress) is not None and p.begun]
            written = [] if self._skip else begun
            states = {p: self.owner.state.get(p) for planned in written for p in planned.params}
            restores = self._meeting.restores if self._meeting is not None and written else []
            self._past = Past(written, states, self._new, self._undo, restores)
        self.abandon()  # if the step was left out: the first one is still to come
        self._let_go()

    def abandon(self) -> None:
        """Forget a plan that was not run: parameters that had no state before it have none again."""
        if not self._has_begun:
            self._new.forget(self.owner.state)
        self._new = NewState()

    def undo(self) -> None:
        """Undo the last step, which must have been planned with ``undo``: every bit is as before it.

        Raises:
            RuntimeError: There is no such step.
        """
        if self._past is None:
            raise RuntimeError("there is no step to take back: it must be planned with undo=UndoBuffers()")
        past = self._past
        try:
            past.take_back(self.owner.state)
        finally:
            if past.progress.begun:
                self._past = None

    def _let_go(self) -> None:
        """Release the tensors after a step, also a failed one: their owner may free or move them."""
        self._inputs, self._meeting = {}, None
        for planned in self._plan:
            planned.bucket.tensors, planned.bucket.steps, planned.bucket.progress = {}, None, None
        for progress in self._progress:
            progress.let_go()

    def _count_versions(self) -> None:
        """Tell autograd about writes that torch will not see.

        A later backward through an old weight must fail as after any in-place update.
        """
        for planned in self._plan:
            if planned.engine.uses_addresses:
                tensors = planned.bucket.tensors
                torch.autograd.graph.increment_version([*tensors["p"], *tensors.get("copy", ())])

    def _can_capture(self, grads: Mapping[Tensor, Tensor] | None) -> bool:
        """Whether the planned step can be recorded as a CUDA graph; warns if not.

        Raises:
            RuntimeError: A parameter has no gradient.
        """
        return can_capture(self._plan, self.owner.param_groups, grads)

    def _run_captured(self, max_norm: float | None, loss: LossScale | None) -> None:
        from lightning_optim.engines.triton.graph import CapturedSteps  # only who captures needs it

        if self._captured is None:
            self._captured = CapturedSteps()
        work: list[Any] = [(planned.engine, planned.bucket) for planned in self._plan]
        self._count_versions()
        self._new = NewState()  # slots of zeros equal no state, since no first step is special here
        self.scaling = self._captured.run(work, lambda bucket: self._table(bucket, None), max_norm, loss)
        self._progress = [Progress()]
        self._progress[0].write([])
        self._let_go()

    def report(self, *, scaled: bool = False) -> list[Decision]:
        """The engine of each bucket of the last step; before the first step, what it would be.

        Args:
            scaled: Whether gradients are going to be unscaled or clipped in the step.
        """
        if not self._plan:
            params = [p for group in self.owner.param_groups for p in group["params"]]
            scaled = scaled or self.planner.options.max_grad_norm is not None
            chosen = self._selected([None if is_uninitialized(p) else p for p in params])
            copies = {p: local(p) for p in params} if self.planner.part in ("direction", "within") else None
            weights = [p for p in chosen if p is not None]
            plan = self.planner.build(self.planner.members(chosen), weights, copies, scaled)
            return [planned.decision for planned in plan]
        return [planned.decision for planned in self._plan]

    def planner_of(self, group: Group, p: Tensor) -> Planner:
        """The planner that knows the state of a param group's parameter."""
        del group, p
        return self.planner

    def number_parameters(self, numbers: Sequence[int]) -> None:
        """Set each parameter's number, for the noise of stochastic rounding; by default they are counted in order."""
        self.planner.numbers = numbers

    def _selected(self, found: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """One value for each parameter, with None in place of those of parameters that are not stepped."""
        if self._selects is None:
            return found
        chosen = [self._selects(group, p) for group in self.owner.param_groups for p in group["params"]]
        return [value if mine else None for value, mine in zip(found, chosen, strict=True)]

    def _knows(self, structure: Structure, gradients: list[Tensor], copies: Mapping[Tensor, Tensor] | None) -> bool:
        """Whether there is a plan for this structure and these tensors; if so, it is filled."""
        for index, (known, plan) in enumerate(self._plans):
            if known == structure:
                self._plan = plan
                if self._fill(gradients, copies):
                    self._plans.insert(0, self._plans.pop(index))
                    return True
                inputs = self._inputs
                self._let_go()
                self._inputs = inputs  # for the plan that is made next
        return False

    def _fill(self, gradients: list[Tensor], copies: Mapping[Tensor, Tensor] | None) -> bool:
        """Gather this step's tensors; False if a tensor no longer is what the plan was made for."""
        return all(
            fill(planned, self.owner.state, gradients, copies, self._undo, self._inputs, self.observed)
            for planned in self._plan
        )

    def _table(self, bucket: Bucket, factor: Tensor | None) -> list[Scalars]:
        """The scalars of each param group."""
        common: dict[str, float | Tensor] = {"seed": NOISE_SEED}
        if factor is not None:
            # On a device it stays there: reading it would wait for the device.
            on_cpu = bucket.device.type == "cpu"
            common["grad_scale"] = factor.item() if on_cpu else factor.to(bucket.device, bucket.layout.math)
        return [{**self.planner.scalars(group), **common} for group in self.owner.param_groups]

    def squares(self) -> Tensor:
        """The sum of squares of all gradients, with all their shards, in parts on the first one's device."""
        return total_squares(self.local_squares())

    def local_squares(self) -> LocalSquares:
        """The sums of squares of this process's part of the gradients, by what the gradients are divided over."""
        sums: LocalSquares = {}
        for planned in self._plan:
            sums.setdefault(planned.shards, []).append(planned.engine.sum_of_squares(planned.bucket))
        return sums
