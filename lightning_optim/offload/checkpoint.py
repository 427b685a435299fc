"""Checkpoints of detached steps, in the format that they would have without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.offload.pipeline import Detached
from lightning_optim.stepping.loading import readable
from lightning_optim.stepping.shards import local


def gathered_state(detached: Detached, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's ``state_dict``, with the states that other processes have. Collective.

    Args:
        detached: What steps the optimizer.
        optimizer: The optimizer.

    Returns:
        The same as ``optimizer.state_dict()``, but with the states of all parameters.
    """
    saved = optimizer.state_dict()
    numbers = {p: number for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[Any, Any] = {key: value for key, value in saved["state"].items() if not isinstance(key, int)}
    for bucket in detached.buckets:
        if bucket.rank is None:
            state |= {numbers[p]: saved["state"][numbers[p]] for p in bucket.params if numbers[p] in saved["state"]}
            continue
        assert detached.replicas is not None  # noqa: S101 # they have assigned the rank
        own = [saved["state"].get(numbers[p], {}) for p in bucket.params]
        for p, values in zip(bucket.params, detached.replicas.gather(bucket, own), strict=True):
            if values:
                state[numbers[p]] = values
    return {**saved, "state": dict(sorted(state.items(), key=lambda item: (isinstance(item[0], str), item[0])))}


def own_entries(detached: Detached, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a ``state_dict`` for parameters whose masters this process has.

    Args:
        detached: What steps the optimizer.
        optimizer: The optimizer.
        state_dict: The state as it was saved.
    """
    state_dict = readable(type(optimizer).__name__, optimizer.param_groups, state_dict)
    others = {p for bucket in detached.buckets if not bucket.mine for p in bucket.params}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [number for group in state_dict["param_groups"] for number in group["params"]]
    names, saved_names = _names(optimizer.param_groups), _names(state_dict["param_groups"])
    if names is not None and saved_names is not None and set(names) == set(saved_names):
        numbers = dict(zip(saved_names, saved, strict=True))  # loading matches parameters by name
        saved = [numbers[name] for name in names]
    dropped = {number for number, p in zip(saved, params, strict=False) if p in others}
    return {**state_dict, "state": {key: value for key, value in state_dict["state"].items() if key not in dropped}}


def gathered_masters(detached: Detached, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The masters that have more bits than their weights, by the names of the parameters. Collective.

    Args:
        detached: What steps the optimizer.
        names: The names of the parameters.

    Returns:
        Copies in host memory.
    """
    detached.publish()
    found: dict[str, Tensor] = {}
    for bucket in detached.buckets:
        if not bucket.widens:
            continue
        masters = [_whole(master) for master in bucket.masters]
        if bucket.rank is not None:
            assert detached.replicas is not None  # noqa: S101 # they have assigned the rank
            gathered = detached.replicas.gather(bucket, [{"master": master} for master in masters])
            masters = [values["master"] for values in gathered]
        found |= {names[p]: master for p, master in zip(bucket.params, masters, strict=True) if p in names}
    return found


def checked_masters(saved: Any, params: Mapping[str, Tensor], optimizers: int) -> list[Mapping[str, Tensor]]:
    """The masters of a checkpoint, for each optimizer, after a check that they fit the parameters.

    Args:
        saved: What the checkpoint has, which may be anything.
        params: The parameters, by name.
        optimizers: How many optimizers there are.

    Raises:
        ValueError: They do not fit; the message names the parameter.
    """
    if not isinstance(saved, (list, tuple)) or len(saved) != optimizers:
        what = f"{len(saved)} entries" if isinstance(saved, (list, tuple)) else type(saved).__name__
        raise ValueError(
            f"the checkpoint's detached_masters are {what}; valid: one dict for each of {optimizers} optimizers"
        )
    for masters in saved:
        if not isinstance(masters, Mapping):
            raise ValueError(f"the checkpoint's detached_masters have a {type(masters).__name__}; valid: dicts")
        for name, master in masters.items():
            if (p := params.get(name)) is not None and (problem := _problem(master, p)) is not None:
                raise ValueError(f"the checkpoint's detached_masters[{name!r}] is {problem}")
    return list(saved)


def _problem(master: Any, p: Tensor) -> str | None:
    if not isinstance(master, Tensor):
        return f"a {type(master).__name__}; valid: a tensor"
    if master.layout != torch.strided or master.device.type == "meta":
        return f"of layout {master.layout} on {master.device}; valid: a dense tensor with memory"
    if master.shape != p.shape:
        return f"of shape {tuple(master.shape)}; valid: {tuple(p.shape)}"
    if master.is_complex() != p.is_complex() or not (master.is_floating_point() or master.is_complex()):
        return f"of {master.dtype}; valid: float32 or float64, or complex as the weight is"
    return None


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    if not all(isinstance(group.get("param_names"), (list, tuple)) for group in groups):
        return None
    names = [name for group in groups for name in group["param_names"]]
    return names if len(set(names)) == len(names) else None


def _whole(master: Tensor) -> Tensor:
    whole = getattr(master, "full_tensor", lambda: local(master))()
    return whole.detach().cpu().clone()
