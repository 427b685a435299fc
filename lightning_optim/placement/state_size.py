"""How large an optimizer's state is, for a step on the weights or on their masters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.adopt import stepper_for, why_not_adopted
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.stepping.plan import Planner
from lightning_optim.stepping.shards import local
from lightning_optim.stepping.stepper import Stepper
from lightning_optim.stepping.together import plain_update, why_one_whole


@runtime_checkable
class KnowsItsState(Protocol):
    """An optimizer outside of this package's rules that can say how large its state will be."""

    def state_bytes(self, params: Sequence[Tensor]) -> int:
        """Bytes of the state that it would have for these parameters (perhaps meta tensors) after some steps."""


@dataclass(frozen=True)
class State:
    """The size of an optimizer's state, and how that is known.

    Attributes:
        bytes: Bytes of the whole state, step counters included.
        values: How many floating-point numbers it holds for weights, whatever their storage type.
        known_by: How the size is known, in words.
        exact: Whether the size is what a step will allocate, rather than an estimate.
    """

    bytes: int
    values: int
    known_by: str
    exact: bool = True


class Sizes:
    """How large an optimizer's state is, and how much its step moves, on its weights or on their masters.

    Args:
        optimizer: The optimizer.
        masters: For each parameter, a tensor on the meta device that stands for its master.
    """

    def __init__(self, optimizer: Optimizer, masters: dict[Tensor, Tensor]) -> None:
        # A wrapper shares param groups and state with the optimizer in it, and that one has the rule.
        while isinstance(inner := getattr(optimizer, "base", None), Optimizer):
            optimizer = inner
        self.optimizer = optimizer
        self.masters = masters
        self._planner_of = _planners(optimizer)
        self.by_rule = self._planner_of is not None

    def matrices(self) -> tuple[list[Tensor], int]:
        """The parameters that are stepped as whole matrices, and the device memory that their directions take."""
        cls: Any = type(self.optimizer)
        if not isinstance(self.optimizer, RuleOptimizer) or cls.matrix_rule is None:
            return [], 0
        groups = self.optimizer.param_groups
        found = [p for group in groups for p in group["params"] if p in self.masters and cls.by_matrices(group, p)]
        return found, cls.matrix_rule.transform.workspace * numbers_in(found)

    def in_buckets(self) -> bool:
        """Whether a detached step can be done bucket by bucket, rather than by the optimizer's own step."""
        if isinstance(self.optimizer, RuleOptimizer):
            own = inspect.unwrap(type(self.optimizer).step) is not inspect.unwrap(RuleOptimizer.step)
            return not own and why_one_whole(type(self.optimizer), self.optimizer.param_groups) is None
        return self.by_rule

    def undoable(self, master_dtype: torch.dtype) -> bool:
        """Whether a detached step can be undone."""
        optimizer = self.optimizer
        if isinstance(optimizer, RuleOptimizer):
            # A step of whole matrices cannot be undone, nor one whose state is wider than the masters' type.
            state = optimizer.options.state_dtype or master_dtype
            fits = torch.promote_types(state, master_dtype) == master_dtype
            return self.in_buckets() and type(optimizer._stepper) is Stepper and fits
        return self.by_rule

    def state(self, *, on_masters: bool) -> State:
        """The size of the state for the weights, or for the masters."""
        if self._planner_of is not None:
            return self._by_rule(self._planner_of, on_masters)
        optimizer, name = self.optimizer, name_of(self.optimizer)
        params = [self._stepped(p, on_masters) for p in self.masters]
        if isinstance(optimizer, KnowsItsState):
            return State(optimizer.state_bytes(params), 0, f"{name}.state_bytes")
        history = option_of(optimizer, "history_size")
        if history is not None:
            # Two vectors for each past step; and the weights, the direction, and the line search's gradients and
            # results, which are seven in torch's L-BFGS and eight in ours.
            vectors = 2 * int(history) + 8
            total = vectors * sum(map(bytes_of, params))
            return State(total, vectors * numbers_in(params), f"{vectors} vectors for history_size={history}", False)
        dry = _dry_step(optimizer, dict(zip(self.masters, params, strict=True)))
        # The state that it has may be incomplete: some optimizers make a part of their state in the constructor.
        has_state = any(optimizer.state.get(p) for p in self.masters)
        return self._measured(on_masters) if has_state and not dry.exact else dry

    def traffic(self, *, on_masters: bool) -> int:
        """Bytes that one step moves, without the copies of new weights."""
        if self._planner_of is None:
            state = self.state(on_masters=on_masters)
            weights = sum(bytes_of(self._stepped(p, on_masters)) for p in self.masters)
            # Torch's own loops move more: each operator reads and writes what a single pass keeps in registers.
            return sum(map(bytes_of, self.masters)) + 2 * weights + 2 * state.bytes
        total = 0
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p in self.masters:
                    total += _moved(self._planner_of(group, p), group, p, self._stepped(p, on_masters))
        return total

    def _by_rule(self, planner_of: Callable[[dict[str, Any], Tensor], Planner], on_masters: bool) -> State:
        total = values = 0
        shared: set[str] = set()  # slots that exist once, for all parameters
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p not in self.masters:
                    continue
                planner = planner_of(group, p)
                stepped = self._stepped(p, on_masters)
                slots = set(planner.slots(group, stepped)) - shared
                shared |= {slot for slot in slots if planner.slot(slot).rate == "shared"}
                for slot in slots:
                    size = planner.slot(slot).shape_for(stepped.shape).numel()
                    total += size * planner.slot_dtype(stepped, slot).itemsize
                    values += size * (2 if stepped.is_complex() else 1)
                total += 4 * planner.counts_steps()  # one float32 for each parameter
        return State(total, values, "its rule's slots and their storage types")

    def _measured(self, on_masters: bool) -> State:
        total = values = 0
        for p, state in self.optimizer.state.items():
            for value in filter(lambda value: isinstance(value, Tensor), state.values()):
                value = local(value)
                like_weight = value.dtype == p.dtype and value.numel() == local(p).numel()
                wide = on_masters and like_weight and p in self.masters
                total += value.numel() * (self.masters[p].dtype if wide else value.dtype).itemsize
                values += numbers_in([value]) if like_weight else 0
        return State(total, values, "measured: the state that it has")

    def _stepped(self, p: Tensor, on_masters: bool) -> Tensor:
        """A meta tensor of the shape and type of what is stepped: the master, or this process's part of the weight."""
        return self.masters[p] if on_masters else torch.empty_like(local(p), device="meta")


def _planners(optimizer: Optimizer) -> Callable[[dict[str, Any], Tensor], Planner] | None:
    """A function that gives the planner of a group's parameter; None if our engines cannot step the optimizer."""
    if isinstance(optimizer, RuleOptimizer):
        return optimizer._stepper.planner_of
    if why_not_adopted(optimizer) is None:
        return stepper_for(optimizer).planner_of
    return None


def _moved(planner: Planner, group: dict[str, Any], p: Tensor, stepped: Tensor) -> int:
    """Bytes that a Program moves for one parameter."""
    slots = planner.slots(group, stepped)
    program = plain_update(planner.method, group, stepped, fresh=False, due=False).program
    size = {"p": stepped.dtype.itemsize * stepped.numel(), "g": p.dtype.itemsize * stepped.numel()}
    for slot in slots:
        numbers = planner.slot(slot).shape_for(stepped.shape).numel()
        size[slot] = planner.slot_dtype(stepped, slot).itemsize * numbers
    # Under a policy, the weight is read even if the rule does not read it, and Kahan's slot is read and written.
    read = [
        {node.attr("name") for node in map(program.nodes.__getitem__, sweep.elements) if node.op == "load"}
        for sweep in program.passes
    ]
    read[-1] |= {"p", *slots}
    before = [set(phase.program.loads) for phase in program.phases]  # read earlier, for sums over all parameters
    return sum(size[name] for names in (*before, *read) for name in names) + sum(size[name] for name in ("p", *slots))


def _dry_step(optimizer: Optimizer, stepped: dict[Tensor, Tensor]) -> State:
    """The state that an optimizer of the same class and options makes in a step on the meta device."""
    name, options = name_of(optimizer), _options(optimizer)
    weights = sum(map(bytes_of, stepped.values()))
    # If that fails, the guess is Adam's state, the most common one.
    guess = partial(State, 2 * weights, 2 * numbers_in(stepped.values()), exact=False)
    try:
        groups = [
            {**_settings(group, options), "params": [nn.Parameter(stepped[p]) for p in group["params"] if p in stepped]}
            for group in optimizer.param_groups
        ]
        groups = [group for group in groups if group["params"]]
        copy: Any = type(optimizer)(groups, **_settings(optimizer.defaults, options))
    except Exception as error:  # anybody's constructor may raise anything
        return guess(f"an estimate, two slots as in Adam: {name} could not be made on the meta device ({error})")
    params = [p for group in copy.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.empty_like(p)
    stopped = None
    try:
        with torch.no_grad():
            copy.step()
    except Exception as error:  # as may anybody's step
        stopped = str(error).partition("\n")[0]
    if stopped is not None and not all(copy.state.get(p) for p in params):
        return guess(f"an estimate, two slots as in Adam: a dry step of {name} failed ({stopped})")
    tensors = [value for state in copy.state.values() for value in state.values() if isinstance(value, Tensor)]
    known_by = "a dry step on the meta device" + (f", up to where it stopped ({stopped})" if stopped else "")
    values = numbers_in([value for value in tensors if value.ndim])
    return State(sum(map(bytes_of, tensors)), values, known_by, stopped is None)


def _options(optimizer: Optimizer) -> set[str]:
    return set(inspect.signature(type(optimizer)).parameters) - {"params"}


def _settings(group: dict[str, Any], options: set[str]) -> dict[str, Any]:
    # Some options choose an implementation that the meta device does not have.
    return {
        name: value
        for name, value in group.items()
        if name in options and name not in ("params", "fused", "foreach", "capturable")
    }


def option_of(optimizer: Optimizer, name: str) -> Any:
    """An option of an optimizer, whether it is an attribute, one of its ``options``, or in its param groups."""
    value = getattr(optimizer, name, getattr(getattr(optimizer, "options", None), name, None))
    if value is None:
        value = next((group[name] for group in optimizer.param_groups if name in group), None)
    return value


def name_of(optimizer: Optimizer) -> str:
    """The name under which users know an optimizer; a wrapper's has the name of the optimizer in it."""
    if isinstance(inner := getattr(optimizer, "base", None), Optimizer):
        return f"{type(optimizer).__name__}({name_of(inner)})"
    if callable(public := getattr(type(optimizer), "public_name", None)):
        return str(public())
    module = type(optimizer).__module__.partition(".")[0]
    return f"{module}.optim.{type(optimizer).__name__}" if module == "torch" else type(optimizer).__qualname__


def bytes_of(tensor: Tensor) -> int:
    """Bytes of this process's part of a tensor."""
    tensor = local(tensor)
    return tensor.numel() * tensor.element_size()


def numbers_in(tensors: Iterable[Tensor]) -> int:
    """How many real numbers this process's part of some tensors holds; a complex number counts as two."""
    return sum(local(t).numel() * (2 if t.is_complex() else 1) for t in tensors)
