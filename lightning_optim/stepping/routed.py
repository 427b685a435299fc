"""Steps of optimizers that step matrices and other parameters by different rules.

A step of matrices is a chain (see :mod:`lightning_optim.rules.matrix`): a Program turns gradients into directions and
writes them to batches of matrices of one shape; the transform runs on one batch after the other; optionally a second
Program runs on the results, which are then transformed back; and a last Program moves the weights. All other parameters
have an element-wise rule of their own, in the same step, under the same clipping and loss scale.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_optim.engines.base import Decision
from lightning_optim.engines.progress import Progress, Write
from lightning_optim.engines.scaling import LossScale, Scaling
from lightning_optim.rules.matrix import Stack
from lightning_optim.rules.rule import UPDATES, Rule
from lightning_optim.stepping.links import Link, RoutedMethod
from lightning_optim.stepping.matrices import Batch, Kind, as_slot, as_weight, lies_transposed
from lightning_optim.stepping.method import Group, Inputs, Options, Owner, Part
from lightning_optim.stepping.plan import Planner
from lightning_optim.stepping.preparing import prepare
from lightning_optim.stepping.shards import LocalSquares, is_distributed, local, shards_of
from lightning_optim.stepping.split_groups import follow
from lightning_optim.stepping.stepper import Stepper
from lightning_optim.stepping.undo import UndoBuffers
from lightning_optim.warnings import warn_once


class RoutedStepper(Stepper):
    """Steps parameters that are matrices by a matrix rule, and the others by an element-wise one.

    Args:
        owner: Has ``param_groups`` and ``state``.
        method: The rules, which rule steps which parameter, and how a param group's options map to their inputs.
        options: The options that hold for all groups.
    """

    def __init__(self, owner: Owner, method: RoutedMethod, options: Options) -> None:
        rest, rule = method.rest, method.matrix_rule
        by_matrices = method.by_matrices
        super().__init__(
            owner,
            Link(method, rest.rule, rest.name, rest.flags),
            options,
            selects=lambda group, p: not by_matrices(group, p),
        )

        def link(rule: Rule, name: str | None, part: Part) -> Stepper:
            return Stepper(owner, Link(method, rule, name), options, part=part, selects=by_matrices)

        self.method, self.rule = method, rule
        self._direct = link(rule.direction, None, "direction")
        self._within = None if rule.within is None else link(rule.within, rule.within.name, "within")
        self._move = link(rule.move, "moves", "move")
        #: The planner that knows all slots of a matrix.
        self._keeper = self._direct.planner
        if rule.state is not rule.direction:
            self._keeper = Planner(self.owner, Link(method, rule.state), options, native_state=False)
        self._has_rest = self._has_matrices = self._is_within = self._is_moving = self._left_out = False
        self._batches: list[Batch] = []
        self._turned: dict[Tensor, Tensor] = {}  # transformed directions, for the rule within
        self._updates: dict[Tensor, Tensor] = {}  # directions for the moves
        self._copies: Mapping[Tensor, Tensor] | None = None
        self._beginning: dict[Tensor, Tensor] = {}  # the gradients of parameters whose state is only made
        self._counts: list[Write] = []
        self._written = Progress()  # the state of matrices, batch by batch; then copies of weights, and step counts

    def plan(
        self,
        grads: Mapping[Tensor, Tensor] | None = None,
        copies: Mapping[Tensor, Tensor] | None = None,
        *,
        inputs: Inputs | None = None,
        scaled: bool = False,
        undo: UndoBuffers | None = None,
    ) -> bool:
        """See :meth:`Stepper.plan`; such a step cannot be undone."""
        if undo is not None:
            raise ValueError(f"the step of {self.method.public_name()} cannot be taken back; valid: undo=None")
        follow(self.owner.param_groups)
        for stepper in self._links:
            stepper._progress = []
        self._written, self._copies, self._left_out = Progress(), copies, False
        self.abandon()  # forget the slots that a plan has made which was not run
        self._beginning = self._beginners(grads)
        self._has_rest = super().plan(grads, copies, inputs=inputs, scaled=scaled)
        given, directions = self._lay_out(grads)
        try:
            self._prepare(given)
            self._has_matrices = self._direct.plan(given, directions, scaled=scaled)
        except BaseException:
            self.abandon()
            raise
        return self._has_rest or self._has_matrices or bool(self._beginning)

    def local_squares(self) -> LocalSquares:
        """See :meth:`Stepper.local_squares`: of all parameters that have a gradient."""
        sums = super().local_squares() if self._has_rest else {}
        for where, parts in (self._direct.local_squares() if self._has_matrices else {}).items():
            sums.setdefault(where, []).extend(parts)
        for group, p in self._places():
            if p in self._beginning and not self.method.by_matrices(group, p):
                g = as_weight(self._beginning[p], p)
                sums.setdefault(shards_of(p) if is_distributed(p) else (), []).append(
                    torch.linalg.vector_norm(local(g), dtype=_double(g)).square().reshape(1)
                )
        return sums

    def abandon(self) -> None:
        """See :meth:`Stepper.abandon`."""
        super().abandon()
        for stepper in self._links:
            stepper.abandon()

    @property
    def has_written(self) -> bool:
        """See :meth:`Stepper.has_written`."""
        return self._has_begun and not self._left_out

    @property
    def _links(self) -> list[Stepper]:
        return [stepper for stepper in (self._direct, self._within, self._move) if stepper is not None]

    @property
    def _has_begun(self) -> bool:
        # A direction rule without slots writes only to temporary memory of this step, which does not count.
        kept = self._links if self.rule.direction.all_slots else self._links[1:]
        return super()._has_begun or self._written.begun or any(stepper._has_begun for stepper in kept)

    def _start(self, scaling: Scaling | None) -> None:
        self.scaling, self._is_within, self._is_moving = scaling, False, False
        # If first state is made, the host must know whether the step is left out.
        begins = bool(self._beginning)
        if self._has_rest:
            self._fresh |= begins
            super()._start(scaling)
        if self._has_matrices:
            self._direct._fresh |= begins
            self._lend_counters(self._direct, later=[self._within, self._move])
            self._direct._start(scaling)
        if self._has_rest or self._has_matrices:
            self._left_out = self._skip or self._direct._skip
        else:
            self._left_out = scaling is not None and scaling.skip()
        self._counts = self._counting()

    def _go_on(self) -> None:
        if self._has_matrices:
            self._direct._go_on()
        if not self._left_out:
            for batch in self._batches:
                if batch.stack is None:
                    self._transform(batch)
        if self._has_rest:
            super()._go_on()
        if self._left_out:
            return
        if self._turned:
            self._go_on_within()
        self._written.finish()
        while (index := self._written.parts) < len(self._batches):
            self._written.write(self._renewed(self._batches[index]))
        if self._written.parts == len(self._batches):
            self._written.write([*self._begun(), *self._counts])
        if not self._updates:
            return
        if not self._is_moving:
            self._move.plan(self._updates, self._copies)
            self._move._start(self._decided())
            self._is_moving = True
        self._move._go_on()

    def _transform(self, batch: Batch) -> None:
        """Run the transform on a batch's directions."""
        kind, transform = batch.kind, self.rule.transform
        x = batch.collected()
        stack = Stack(kind.constants, kind.due, partial(batch.stacked, state=self.owner.state))
        if kind.begins:
            transform.begin(x, stack)
        else:
            out = self._updates if self._within is None else self._turned
            out.update(batch.divided(transform.forth(x, stack)))
            batch.given = None if self._within is None else x
        batch.directions, batch.stack = None, stack

    def _go_on_within(self) -> None:
        assert self._within is not None  # noqa: S101
        if not self._is_within:
            places: dict[Tensor, Tensor] = {}
            for batch in self._batches:
                if not batch.kind.begins:
                    places.update(batch.allocate())
            self._within.plan(self._turned, places)
            self._lend_counters(self._within, later=[self._move])
            self._within._start(self._decided())
            self._is_within = True
        self._within._go_on()

    def _renewed(self, batch: Batch) -> list[Write]:
        """The writes of a batch's new state, after its directions have been transformed back."""
        assert batch.stack is not None  # noqa: S101
        stack, writes = batch.stack, list[Write]()
        if batch.given is not None:
            self._updates.update(batch.divided(self.rule.transform.back(batch.collected(), batch.given, stack)))
        decided = self._decided()
        for slot, value in stack.new.items():
            if decided is not None and decided.loss is not None:
                value = torch.where(decided.loss.found_inf.to(value.device) != 0, stack.read(slot), value)
            for (p, _), part in zip(batch.weights, batch.parts(value), strict=True):
                stored = self.owner.state[p][slot]
                writes.append(partial(stored.copy_, as_slot(part, stored)))
        return [*writes, partial(batch.let_go)]

    def _counting(self) -> list[Write]:
        """The writes that count a step of the groups whose matrices are stepped, if their steps are counted."""
        if self.rule.interval is None:
            return []
        stepped = {p for batch in self._batches for p, _ in batch.weights}
        groups = [group for group in self.owner.param_groups if not stepped.isdisjoint(group["params"])]
        return [partial(group.__setitem__, UPDATES, group.get(UPDATES, 0) + 1) for group in groups]

    def _begun(self) -> list[Write]:
        """The writes for parameters whose state is only made: their copies get the weight as it is."""
        if self._copies is None:
            return []
        return [partial(self._copies[p].copy_, _seen(p, self._copies[p])) for p in self._beginning]

    def _decided(self) -> Scaling | None:
        """How later Programs learn on the device that the first one left the step out; None: the host decides."""
        if self.scaling is None or self.scaling.loss is None:
            return None
        if not all(planned.engine.controls_on_device for planned in self._direct._plan):
            return None
        return Scaling(None, LossScale(None, self.scaling.loss.found_inf, check=False))

    def _end(self) -> None:
        for stepper in self._links:
            stepper._end()
        super()._end()
        for batch in self._batches:
            batch.stack = None  # it refers to the batch and the state
        # Memory is held during a step only.
        self._batches, self._turned, self._updates, self._copies, self._beginning = [], {}, {}, None, {}

    def _let_go(self) -> None:
        super()._let_go()
        self._written.let_go()
        for stepper in self._links:
            stepper._let_go()

    def planner_of(self, group: Group, p: Tensor) -> Planner:
        """See :meth:`Stepper.planner_of`."""
        return self._keeper if self.method.by_matrices(group, p) else self.planner

    def number_parameters(self, numbers: Sequence[int]) -> None:
        """See :meth:`Stepper.number_parameters`."""
        for stepper in self._links:
            stepper.planner.numbers = numbers
        self.planner.numbers = numbers

    def report(self, *, scaled: bool = False) -> list[Decision]:
        """See :meth:`Stepper.report`."""
        decisions = self._direct.report(scaled=scaled)
        for stepper in self._links[1:]:
            decisions += stepper.report()
        return [*decisions, *super().report(scaled=scaled)]

    def _can_capture(self, grads: Mapping[Tensor, Tensor] | None) -> bool:
        warn_once(
            f"lightning-optim: the step of {self.method.public_name()} is not captured as a CUDA graph (matrices are "
            "transformed between its kernels)",
            key=f"capture: matrices of {self.method.public_name()}",
        )
        return False

    @staticmethod
    def _lend_counters(stepper: Stepper, later: Sequence[Stepper | None]) -> None:
        """Give a stepper copies of the counters if a later Program of the same parameters counts the step too."""
        counted = any(other is not None and other.planner.method.rule.counts_steps for other in later)
        for planned in stepper._plan:
            bucket = planned.bucket
            policy = bucket.update.policy
            if bucket.steps and (counted or (policy.rounds and policy.rounding == "stochastic")):
                bucket.steps = list(torch.stack(bucket.steps).unbind())
                if planned.engine.uses_addresses:
                    bucket.step_addresses = array("q", map(Tensor.data_ptr, bucket.steps))

    def _selected(self, found: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        chosen = super()._selected(found)
        if not self._beginning:
            return chosen
        return [None if p in self._beginning else g for (_, p), g in zip(self._places(), chosen, strict=True)]

    def _places(self) -> list[tuple[Group, Tensor]]:
        return [(group, p) for group in self.owner.param_groups for p in group["params"]]

    def _beginners(self, grads: Mapping[Tensor, Tensor] | None) -> dict[Tensor, Tensor]:
        """The gradients of parameters without state, if a first gradient only makes the state.

        Raises:
            RuntimeError: A parameter has state that was made under other options.
        """
        found: dict[Tensor, Tensor] = {}
        for number, (group, p) in enumerate(self._places() if self.rule.begins else ()):
            g = p.grad if grads is None else grads.get(p)
            if g is None or not p.numel():
                continue
            state, planner = self.owner.state.get(p) or {}, self.planner_of(group, p)
            if all(state.get(slot) is None for slot in planner.method.rule.all_slots):
                found[p] = g
                continue
            kept = {slot for slot in self.rule.slots if state.get(slot) is not None}
            if wrong := kept ^ set(self.rule.slots).intersection(planner.slots(group, p)):
                has = f"{'' if wrong & kept else 'no '}{min(wrong)}"
                raise RuntimeError(
                    f"parameter {number} (shape {tuple(p.shape)}, {p.device}): its state has {has}, as by other "
                    "options than its param group has now; valid: the options by which it was begun"
                )
        return found

    def _prepare(self, given: Mapping[Tensor, Tensor]) -> None:
        """Make the state that no Program's plan makes; like theirs, it is made before anything is written."""
        places = self._places()
        if self._keeper is not self._direct.planner:
            prepare(self._keeper, self._keeper.members([given.get(p) for _, p in places]), self._new)
        if self._beginning:
            rest = [None if p in given else self._beginning.get(p) for _, p in places]
            prepare(self.planner, self.planner.members(rest), self._new)

    def _lay_out(self, grads: Mapping[Tensor, Tensor] | None) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """Make batches for all matrices with a gradient; returns the gradients, and where directions are written."""
        self._turned, self._updates, self._batches = {}, {}, []
        rule, transform = self.rule, self.rule.transform
        given: dict[Tensor, Tensor] = {}
        directions: dict[Tensor, Tensor] = {}
        open_batches: dict[Kind, Batch] = {}
        known: dict[tuple[int, tuple[int, ...]], Hashable] = {}
        for number, group in enumerate(self.owner.param_groups):
            due = rule.due(group)
            for p in group["params"]:
                g = p.grad if grads is None else grads.get(p)
                if g is None or not self.method.by_matrices(group, p):
                    continue
                given[p] = as_weight(g, p)
                dtype = transform.dtype(p)
                seen = transform.shape(group, p)
                if seen is None:
                    directions[p] = torch.empty_like(local(p), dtype=dtype, requires_grad=False)
                    self._updates[p] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
                    continue
                count, *sides = seen
                shape = tuple(sides)
                if (number, shape) not in known:
                    known[number, shape] = transform.constants(group, shape)
                constants = known[number, shape]
                if transform.any_order and lies_transposed(p):
                    shape = shape[::-1]
                kind = Kind(shape, dtype, p.device, constants, due, p in self._beginning)
                batch = open_batches.get(kind)
                if batch is None or not batch.room_for(count, transform.most):
                    batch = open_batches[kind] = Batch(kind, transform.any_order)
                    self._batches.append(batch)
                batch.weights.append((p, count))
        for batch in self._batches:
            directions.update(batch.allocate())
        return given, directions


def _double(g: Tensor) -> torch.dtype:
    return torch.complex128 if g.is_complex() else torch.float64


def _seen(p: Tensor, copy: Tensor) -> Tensor:
    """A weight in the form of its copy: the DTensor, or this process's part."""
    return p if is_distributed(copy) else local(p)
