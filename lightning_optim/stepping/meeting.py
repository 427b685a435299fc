"""Totals that must be known of all parameters before any is updated, and the slots that all parameters share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_optim.engines.base import Scalars
from lightning_optim.engines.progress import Progress, Write
from lightning_optim.engines.scaling import Scaling
from lightning_optim.rules.interpret import interpret
from lightning_optim.rules.program import Program
from lightning_optim.rules.rule import UPDATES
from lightning_optim.rules.table import widest
from lightning_optim.stepping.method import Group
from lightning_optim.stepping.plan import Planned, Planner
from lightning_optim.stepping.shards import Shards, totals


class Meeting:
    """The meeting point of a step's buckets: totals over all of them become scalars of the Programs that run next.

    Args:
        planner: Knows the param groups and their state.
        plan: The buckets, with their tensors.
        tables: The scalars of each bucket's param groups, which get the totals.
        scaling: How gradients are unscaled and clipped by engines that do so on the device, and whether the step is
            left out there.

    Attributes:
        progress: The writes of shared slots and step counts, to be finished when the buckets have run.
        restores: The writes that undo these.

    The constructor does not write to weights or state, and reads nothing back from a device.
    """

    def __init__(
        self,
        planner: Planner,
        plan: Sequence[Planned],
        tables: Sequence[list[Scalars]],
        scaling: Scaling | None = None,
    ) -> None:
        self._planner, self._plan, self._tables = planner, plan, tables
        first = plan[0].bucket.update
        slots = self._shared_slots(first.shared_slots)
        self._tell(slots)
        for level, phase in enumerate(first.program.phases):
            found: dict[Shards, list[Tensor]] = {}
            for planned, table in zip(plan, tables, strict=True):
                program = planned.bucket.update.program.phases[level].program
                sums = planned.engine.reduce(planned.bucket, program, table, scaling)
                found.setdefault(planned.shards, []).append(sums)
            self._tell(dict(zip(phase.names, totals(found).unbind(), strict=True)))
        shared = first.program.shared
        new = {} if shared is None else self._evaluated(shared)
        if scaling is not None and scaling.loss is not None and all(one.engine.controls_on_device for one in plan):
            left_out = scaling.loss.found_inf != 0  # stays on the device, without waiting
            new = {name: torch.where(left_out.to(slots[name].device), slots[name], x) for name, x in new.items()}
        writes: list[Write] = [partial(slots[name].copy_, value) for name, value in new.items()]
        self.restores: list[Write] = [partial(slots[name].copy_, slots[name].clone()) for name in new]
        for group in self._counting():
            writes.append(partial(group.__setitem__, UPDATES, group[UPDATES] + 1))
            self.restores.append(partial(group.__setitem__, UPDATES, group[UPDATES]))
        self.progress = Progress()
        self.progress.prepare(writes)

    def _counting(self) -> list[Group]:
        """The param groups that are stepped, if their steps are counted."""
        if not self._planner.method.rule.every:
            return []
        numbers = sorted({number for planned in self._plan for number in planned.bucket.groups})
        return [self._planner.owner.param_groups[number] for number in numbers]

    def _shared_slots(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The slots that all parameters have in common: each is one tensor."""
        state = self._planner.owner.state[self._plan[0].params[0]] if names else {}
        return {name: state[name] for name in names}

    def _tell(self, scalars: Mapping[str, Tensor]) -> None:
        """Put scalars into all tables."""
        for planned, table in zip(self._plan, self._tables, strict=True):
            device = planned.bucket.device
            # On the CPU, reading a number costs nothing. For another device, or an engine that decides on the device,
            # it stays a tensor.
            reads = device.type == "cpu" and not planned.engine.controls_on_device
            here = {
                name: value.item() if reads and value.device.type == "cpu" else value.to(device, non_blocking=True)
                for name, value in scalars.items()
            }
            for group in table:
                group.update(here)  # type: ignore[attr-defined] # a dict, made for this step

    def _evaluated(self, shared: Program) -> dict[str, Tensor]:
        """The new values of shared slots: 0-dim tensors in the type of scalars."""
        dtype = widest(self._plan[0].bucket.device)
        values = interpret(shared, {}, self._tables[0][0], dtype)
        return {
            name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype, device="cpu")
            for name, value in values.items()
        }
