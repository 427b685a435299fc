"""A copy of everything that an optimizer's step changes, for param groups that may come, go and change places."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_optim.control.rollback.snapshots import Snapshots, Where
from lightning_optim.control.schedules.learning_rates import GROUP_RATES, all_groups, with_inner


@dataclass(frozen=True)
class _Group:
    """A param group, and its contents when the snapshot was taken.

    Attributes:
        group: The group itself.
        params: Its parameters then.
        options: Its options then.
    """

    group: dict[str, Any]
    params: list[Tensor]
    options: dict[str, Any]


class StepSnapshot:
    """A copy of all that an optimizer's steps change: weights, state, counters, and options but the learning rate.

    Args:
        optimizer: The optimizer; those that it wraps are included.
        more: Returns further tensors that a step changes, such as masters.
        where: See :class:`Snapshots`.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> snapshot = StepSnapshot(optimizer)
        >>> snapshot.begin()
        >>> snapshot.wait()
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        >>> snapshot.restore()
        >>> weight.item(), dict(optimizer.state)
        (1.0, {})
    """

    def __init__(
        self,
        optimizer: Optimizer,
        more: Callable[[], Iterable[Tensor]] = tuple,
        where: Where = "device",
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._more = more
        self._where: Where = where
        self._states: list[dict[Any, Any]] = []
        self._groups: list[_Group] = []
        self._covered: Any = WeakTensorKeyDictionary()
        self.snapshots = Snapshots(self._collected, where)
        self._later: list[Snapshots] = []  # of tensors that came later
        self.taken = False

    def begin(self, *, background: bool = True) -> None:
        """Begin to copy: see :meth:`Snapshots.begin`.

        Raises:
            MemoryError: There is no room for the buffers.
            TypeError: The state has something that is neither a tensor nor a primitive.
        """
        self.taken = False
        self._release_later()
        self.snapshots.begin(background=background)
        self.taken = True

    def extend(self) -> None:
        """Copy tensors that came to the optimizer since, such as an unfrozen layer, before they are stepped.

        Raises:
            MemoryError: There is no room for the buffers.
        """
        if not self.taken:
            return
        new = [t for t in self._tensors() if t not in self._covered]
        if new:
            later = Snapshots(lambda: new, self._where)
            later.begin(background=False)
            self._later.append(later)
            self._covered.update(dict.fromkeys(new, True))

    def wait(self) -> None:
        """Wait until the copy is complete: see :meth:`Snapshots.wait`."""
        self.snapshots.wait()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, bit for bit; slots that did not exist then are removed.

        Groups are recognized wherever they are now, and those that were added stay as they are.
        """
        tensors = self.snapshots.restore()
        for later in self._later:
            later.restore()
        optimizer = self._live()
        states = {id(one.state): one.state for one in with_inner(optimizer)}.values()
        for state, then in zip(states, self._states, strict=True):
            _put(then, state, tensors)
        for group, then in self._known(all_groups(optimizer)):
            _put(then, group, tensors, keep=("params", *GROUP_RATES))

    def release(self) -> None:
        """Free the buffers: see :meth:`Snapshots.release`."""
        self.snapshots.release()
        self._release_later()
        self.taken, self._states, self._groups = False, [], []

    def _release_later(self) -> None:
        for later in self._later:
            later.release()
        self._later = []

    def _known(self, groups: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """The groups that existed when the snapshot was taken, with their options then."""
        same = {id(known.group): known.options for known in self._groups}  # ids are safe: this keeps the groups alive
        if any(id(group) in same for group in groups):
            yield from ((group, same[id(group)]) for group in groups if id(group) in same)
            return
        for group in groups:  # loading has made new groups
            mine = set(map(id, group["params"]))
            if found := [known.options for known in self._groups if mine & set(map(id, known.params))]:
                yield group, found[0]

    def _live(self) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None  # noqa: S101 # the caller holds it
        return optimizer

    def _collected(self) -> list[Tensor]:
        optimizer = self._live()
        leaves = self._tensors()
        self._covered = WeakTensorKeyDictionary(dict.fromkeys(leaves, True))
        states = {id(one.state): one.state for one in with_inner(optimizer)}.values()
        name = type(optimizer).__name__
        self._states = [_taken(state, leaves, f"{name}'s state") for state in states]
        self._groups = [
            _Group(
                group,
                list(group["params"]),
                {
                    key: _taken(value, leaves, None)
                    for key, value in group.items()
                    if key != "params" and key not in GROUP_RATES
                },
            )
            for group in all_groups(optimizer)
        ]
        return leaves

    def _tensors(self) -> list[Tensor]:
        """The tensors that steps change, apart from the state."""
        groups = all_groups(self._live())
        unique = {id(p): p for group in groups for p in group["params"] if p.requires_grad or p.grad is not None}
        return [*unique.values(), *self._more()]


class _Leaf:
    """Stands for a tensor: its index among the tensors of a snapshot."""

    def __init__(self, index: int) -> None:
        self.index = index


def _taken(value: Any, leaves: list[Tensor], owner: str | None) -> Any:
    """A copy of containers and primitives, with :class:`_Leaf` for tensors, which go to ``leaves``.

    Args:
        value: The value.
        leaves: The list to which tensors are added.
        owner: The owner's name, for the error about a value of another type; None: such values are kept as they are.
    """
    if isinstance(value, Tensor):
        leaves.append(value)
        return _Leaf(len(leaves) - 1)
    if isinstance(value, dict):
        return {key: _taken(inner, leaves, owner) for key, inner in value.items()}
    if type(value) in (list, tuple, deque):
        return type(value)(_taken(inner, leaves, owner) for inner in value)
    primitive = value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype)
    if owner is not None and not primitive and not isinstance(value, torch.device | torch.Size):
        raise TypeError(
            f"{owner} has a {type(value).__name__}, which a snapshot cannot copy; valid: tensors, numbers, strings, "
            "None, and lists, tuples, deques and dicts of them"
        )
    return value


def _put(then: Any, now: Any, tensors: Sequence[Tensor], keep: Sequence[str] = ()) -> Any:
    """The value of a snapshot, put into the containers that are there now if these are of the same kind.

    Args:
        then: The value from :func:`_taken`.
        now: The present value in its place.
        tensors: The tensors of the snapshot.
        keep: Keys of a dict that are left alone.
    """
    if isinstance(then, _Leaf):
        return tensors[then.index]
    if isinstance(then, dict):
        into: dict[Any, Any] = now if isinstance(now, dict) else {}
        for key in [key for key in into if key not in then and key not in keep]:
            del into[key]
        into.update({key: _put(inner, into.get(key), tensors) for key, inner in then.items()})
        return into
    if type(then) in (list, deque):
        old = list(now) if type(now) is type(then) else []
        values = [_put(inner, old[i] if i < len(old) else None, tensors) for i, inner in enumerate(then)]
        row = now if type(now) is type(then) else type(then)()
        row.clear()
        row.extend(values)
        return row
    if type(then) is tuple:
        return tuple(_put(inner, None, tensors) for inner in then)
    return then
