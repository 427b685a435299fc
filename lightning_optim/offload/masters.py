"""Master weights in host memory, and views of an optimizer that has them in place of its weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.stepping.shards import is_distributed, local

Group = dict[str, Any]
_ABSENT = object()


def master_of(p: Tensor, storage: Tensor) -> Tensor:
    """A master weight: ``storage`` with the value of ``p``, divided over processes as ``p`` is.

    Args:
        p: The weight on the device.
        storage: Memory of the shape of this process's part of it.
    """
    with torch.no_grad():
        storage.copy_(local(p))
        if not is_distributed(p):
            return nn.Parameter(storage, requires_grad=False)
        from torch.distributed.tensor import DTensor

        whole: Any = p
        divided = DTensor.from_local(
            storage, host_mesh(whole.device_mesh), whole.placements, shape=p.shape, stride=p.stride()
        )
        return nn.Parameter(divided, requires_grad=False)


_host_meshes: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def host_mesh(mesh: Any) -> Any:
    """A mesh of the same processes for tensors in host memory. Collective at the first call for a mesh on a device."""
    if mesh.device_type == "cpu":
        return mesh
    if mesh not in _host_meshes:
        from torch.distributed.device_mesh import DeviceMesh

        groups = [_gloo_group(mesh.get_group(dim)) for dim in range(mesh.ndim)]
        _host_meshes[mesh] = DeviceMesh.from_group(
            groups if len(groups) > 1 else groups[0], "cpu", mesh=mesh.mesh, mesh_dim_names=mesh.mesh_dim_names
        )
    return _host_meshes[mesh]


def _gloo_group(group: Any) -> Any:
    """A Gloo group of the same processes, which communicates host memory."""
    import torch.distributed as dist

    # With `use_local_synchronization` only the members of the group need to call, as other groups do the same.
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)


class GroupOptions:
    """The options of all param groups at one moment.

    They are copies, because schedules change options right after a step, while it may still be going on.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.groups: list[Group] = [
            {
                key: value.detach().clone() if isinstance(value, Tensor) else value
                for key, value in group.items()
                if key not in ("params", "param_names")
            }
            for group in optimizer.param_groups
        ]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GroupOptions):
            return NotImplemented
        return len(self.groups) == len(other.groups) and all(map(_same, self.groups, other.groups))

    __hash__ = None  # type: ignore[assignment] # mutable


def _same(a: Group, b: Group) -> bool:
    if a.keys() != b.keys():
        return False
    return all(
        torch.equal(a[key], b[key])
        if isinstance(a[key], Tensor) and isinstance(b[key], Tensor)
        else type(a[key]) is type(b[key]) and a[key] == b[key]
        for key in a
    )


class MasterState:
    """The state of an optimizer, with masters instead of weights as keys."""

    def __init__(self, optimizer: Optimizer, weights: Mapping[Tensor, Tensor]) -> None:
        self._optimizer, self._weights = weakref.ref(optimizer), weights

    def _state(self) -> Any:
        if (optimizer := self._optimizer()) is None:
            raise RuntimeError("detached: the optimizer no longer exists")
        return optimizer.state

    def __getitem__(self, master: Tensor) -> Any:
        return self._state()[self._weights[master]]

    def __setitem__(self, master: Tensor, values: Any) -> None:
        self._state()[self._weights[master]] = values

    def __contains__(self, master: object) -> bool:
        return isinstance(master, Tensor) and self._weights.get(master) in self._state()

    def get(self, master: Tensor, default: Any = None) -> Any:
        """See ``dict.get``."""
        return self._state().get(self._weights[master], default)

    def pop(self, master: Tensor, default: Any = None) -> Any:
        """See ``dict.pop``."""
        return self._state().pop(self._weights[master], default)


class View:
    """A view of an optimizer that has the masters of some of its parameters.

    Args:
        optimizer: The optimizer; not kept alive.
        places: ``(group_number, index)`` of each parameter: the number of its param group, and its place there.
        masters: The master of each.
        weights: The parameter of each.

    Attributes:
        options: The options of the param groups to step with.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        places: Sequence[tuple[int, int]],
        masters: Sequence[Tensor],
        weights: Sequence[Tensor],
    ) -> None:
        self.options = GroupOptions(optimizer)
        self._groups: dict[int, Group] = {}
        for (group_number, index), master in zip(places, masters, strict=True):
            group = optimizer.param_groups[group_number]
            fresh: Group = {"params": [], **({"param_names": []} if "param_names" in group else {})}
            own = self._groups.setdefault(group_number, fresh)
            own["params"].append(master)
            if "param_names" in group:
                own["param_names"].append(group["param_names"][index])
        self.state = MasterState(optimizer, dict(zip(masters, weights, strict=True)))

    @property
    def param_groups(self) -> list[Group]:
        """The param groups that have some of these parameters, with the masters and with :attr:`options`."""
        return [{**self.options.groups[number], **own} for number, own in self._groups.items()]


def bring_state(
    optimizer: Optimizer, masters: Mapping[Tensor, Tensor], dtype_of: Callable[[Tensor, str], torch.dtype]
) -> None:
    """Convert the state of weights to one for their masters: on the masters' device, and divided as these are.

    Torch's own optimizers make and load state in the weights' type, in which it would lose most of each step.

    Args:
        optimizer: The optimizer that has the state.
        masters: The masters, by parameter.
        dtype_of: Returns the type for a tensor of the state, from the parameter and the tensor's name.
    """
    for p, master in masters.items():
        for name, value in (optimizer.state.get(p) or {}).items():
            if not isinstance(value, Tensor) or name == "step":
                continue
            if not (value.is_floating_point() or value.is_complex()):
                continue
            device = local(master).device
            if value.shape != p.shape:  # a matrix that a rule keeps, or one number for each row
                if value.ndim and value.device != device:
                    optimizer.state[p][name] = value.to(device)
                continue
            dtype = dtype_of(p, name)
            if value.device != device or value.dtype != dtype:
                optimizer.state[p][name] = like_master(local(value).to(device, dtype), master)


def like_master(value: Tensor, master: Tensor) -> Tensor:
    """This process's part of a tensor, as a tensor that is divided as a master is."""
    if not is_distributed(master):
        return value
    from torch.distributed.tensor import DTensor

    whole: Any = master
    return DTensor.from_local(value, whole.device_mesh, whole.placements, shape=master.shape, stride=master.stride())


def part_of(value: Tensor, master: Tensor) -> Tensor:
    """This process's part of a tensor divided as a master is; the tensor may be given as a whole."""
    if is_distributed(value) or not is_distributed(master) or value.shape != master.shape:
        return local(value)
    from torch.distributed.tensor import distribute_tensor

    whole: Any = master
    # All processes have the value: nobody need send it.
    return local(distribute_tensor(value.cpu(), whole.device_mesh, whole.placements, src_data_rank=None))


@contextmanager
def masters_in_place(optimizer: Optimizer, masters: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """A context in which an optimizer has masters in place of its parameters, in the same lists and dicts.

    Args:
        optimizer: The optimizer.
        masters: The masters, by parameter; parameters without one stay.
    """
    weights = {master: p for p, master in masters.items()}
    _exchange(optimizer, masters)
    try:
        yield
    finally:
        _exchange(optimizer, weights)


def _exchange(optimizer: Optimizer, others: Mapping[Tensor, Tensor]) -> None:
    for group in optimizer.param_groups:
        group["params"][:] = [others.get(p, p) for p in group["params"]]
    for p, other in others.items():
        # The dict of the state stays the same: optimizers may have it under another name as well.
        if (state := optimizer.state.pop(p, _ABSENT)) is not _ABSENT:
            optimizer.state[other] = state
