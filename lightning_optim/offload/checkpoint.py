"""What of detached steps is saved, in the format in which it would be saved without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.offload.pipeline import Detached
from lightning_optim.optimizers.loading import readable
from lightning_optim.optimizers.shards import local


def gathered_state(detached: Detached, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's ``state_dict`` with what the other processes have of it. Collective.

    Args:
        detached: What steps the optimizer.
        optimizer: The optimizer.

    Returns:
        As from ``optimizer.state_dict()``, with the states of all parameters.
    """
    saved = optimizer.state_dict()
    numbers = {p: number for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    state: dict[Any, Any] = {key: value for key, value in saved["state"].items() if not isinstance(key, int)}
    for bucket in detached.buckets:
        if bucket.rank is None:
            state |= {numbers[p]: saved["state"][numbers[p]] for p in bucket.params if numbers[p] in saved["state"]}
            continue
        assert detached.replicas is not None  # noqa: S101 # ranks are its
        own = [saved["state"].get(numbers[p], {}) for p in bucket.params]
        for p, values in zip(bucket.params, detached.replicas.gather(bucket, own), strict=True):
            if values:
                state[numbers[p]] = values
    return {**saved, "state": dict(sorted(state.items(), key=lambda item: (isinstance(item[0], str), item[0])))}


def own_entries(detached: Detached, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Of a ``state_dict``, what is of parameters whose masters this process has.

    Args:
        detached: What steps the optimizer.
        optimizer: The optimizer.
        state_dict: As saved.
    """
    state_dict = readable(type(optimizer).__name__, optimizer.param_groups, state_dict)
    others = {p for bucket in detached.buckets if not bucket.mine for p in bucket.params}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [number for group in state_dict["param_groups"] for number in group["params"]]
    dropped = {number for number, p in zip(saved, params, strict=False) if p in others}
    return {**state_dict, "state": {key: value for key, value in state_dict["state"].items() if key not in dropped}}


def gathered_masters(detached: Detached, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The masters that have more bits than their weights, by the names of these. Collective.

    Args:
        detached: What steps the optimizer.
        names: Of the parameters.

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
            assert detached.replicas is not None  # noqa: S101 # ranks are its
            gathered = detached.replicas.gather(bucket, [{"master": master} for master in masters])
            masters = [values["master"] for values in gathered]
        found |= {names[p]: master for p, master in zip(bucket.params, masters, strict=True) if p in names}
    return found


def _whole(master: Tensor) -> Tensor:
    whole = getattr(master, "full_tensor", lambda: local(master))()
    return whole.detach().cpu().clone()
