"""Whether a planned step can be recorded as a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_optim.stepping.method import Group
from lightning_optim.stepping.plan import Planned
from lightning_optim.warnings import warn_once


def can_capture(plan: Sequence[Planned], groups: Sequence[Group], grads: Mapping[Tensor, Tensor] | None) -> bool:
    """Whether the planned step can be recorded as a CUDA graph; warns if not.

    Args:
        plan: The buckets of the step.
        groups: The optimizer's param groups.
        grads: Gradients by parameter; None: each parameter's ``grad``.

    Raises:
        RuntimeError: A parameter has no gradient.
    """
    from lightning_optim.engines.triton.graph import CapturedSteps  # only who captures needs it

    reason = CapturedSteps.rejects([(planned.engine, planned.bucket) for planned in plan])
    if reason is None and any(planned.shards for planned in plan):
        reason = "the norm of sharded gradients needs other processes"
    if reason is None and any(planned.bucket.update.meets for planned in plan):
        reason = "its parameters have something in common, which the host sees to"
    if reason is not None:
        warn_once(f"lightning-optim: the step is not captured as a CUDA graph ({reason})", key=f"capture: {reason}")
        return False
    absent = [
        _label(group, index)
        for group in groups
        for index, p in enumerate(group["params"])
        if p.requires_grad and (p.grad if grads is None else grads.get(p)) is None
    ]
    if absent:
        raise RuntimeError(
            f"a captured step needs a gradient for every parameter; there is none for {', '.join(absent[:5])}"
            f"{' and others' if len(absent) > 5 else ''}; valid: requires_grad=False for them, or capture=False"
        )
    return True


def _label(group: dict[str, Any], index: int) -> str:
    return (
        repr(group["param_names"][index]) if "param_names" in group else f"shape {tuple(group['params'][index].shape)}"
    )
