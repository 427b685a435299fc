"""Checks that a step can read and write tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy as is_uninitialized

from lightning_optim.engines.memory import has_address, is_lazy, is_plain, overlaps_itself, problem_of_storage
from lightning_optim.rules.slots import Slot


def problem_of_weight(p: Tensor) -> str | None:
    """Why a weight can never be written element by element, whatever is done first; None if it can be."""
    if is_uninitialized(p):
        return None  # a lazy module's, which has neither shape nor memory before its first forward pass
    if p.layout != torch.strided:
        return f"it has layout {p.layout}; valid: dense weights"
    if p.is_conj():
        return "it is lazily conjugated, and so the view of another number; valid: its resolve_conj() as the parameter"
    if is_plain(p) and overlaps_itself(p):
        return f"its elements share memory (strides {p.stride()}); valid: its clone() as the parameter"
    return None


def check_weight(label: str, p: Tensor) -> None:
    """Check the weight that is to be stepped now.

    Raises:
        RuntimeError: It cannot be stepped.
    """
    problem = problem_of_weight(p) or _problem_of_memory(p)
    if problem is None and p.is_inference() and not torch.is_inference_mode_enabled():
        problem = "it was made in inference mode, outside of which it cannot be written; valid: its clone()"
    if problem is not None:
        raise RuntimeError(f"{label} cannot be stepped: {problem}")


def check_gradient(label: str, p: Tensor, g: Tensor) -> None:
    """Check a gradient.

    Raises:
        RuntimeError: It is sparse, or of another shape, device or kind of number than its parameter.
    """
    if g.layout != torch.strided:
        raise RuntimeError(
            f"{label} has a gradient of layout {g.layout}; valid: dense gradients (use sparse=False in nn.Embedding), "
            "or torch.optim.SparseAdam for this parameter"
        )
    if g.shape != p.shape or g.device != p.device:
        raise RuntimeError(f"{label} has a gradient of shape {tuple(g.shape)} on {g.device}")
    if g.is_complex() != p.is_complex() or not (g.is_floating_point() or g.is_complex()):
        raise RuntimeError(f"{label} has a gradient of type {g.dtype}; valid: any {_kind(p)} type")
    if (problem := _problem_of_memory(g)) is not None:
        raise RuntimeError(f"{label} has a gradient that cannot be read: {problem}")


def check_slot(label: str, p: Tensor, name: str, value: Any, slot: Slot) -> None:
    """Check the value of a slot in a parameter's state.

    Raises:
        RuntimeError: The value does not fit the parameter.
    """
    problem = None
    if not isinstance(value, Tensor):
        problem = repr(value)
    elif value.layout != torch.strided:
        problem = f"layout {value.layout}"
    elif value.shape != slot.shape_for(p.shape) or (value.device != p.device and slot.rate != "shared"):
        problem = f"shape {tuple(value.shape)} on {value.device}"
    elif value.is_complex() != (p.is_complex() and not slot.is_scalar) or not _is_number(value):
        problem = f"type {value.dtype} (valid: any {_kind(p)} type)"
    elif (memory := _problem_of_memory(value)) is not None:
        problem = f"no memory: {memory}"
    if problem is not None:
        raise RuntimeError(f"{label}: its state does not fit: {name} has {problem}")


def usable_counter(step: Any) -> bool:
    """Whether engines can advance this step counter."""
    return (
        isinstance(step, Tensor)
        and is_plain(step)
        and step.layout == torch.strided
        and step.dtype == torch.float32
        and step.numel() == 1
        and not is_lazy(step)
        and (torch.is_inference_mode_enabled() or not step.is_inference())
        and _problem_of_memory(step) is None
    )


def counted(label: str, step: Any) -> float:
    """The step of a parameter's state as a number.

    Raises:
        RuntimeError: The step is not a number.
    """
    try:
        return float(step)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise RuntimeError(f"{label}: its state does not fit: step is {step!r}; valid: a number") from error


def _problem_of_memory(tensor: Tensor) -> str | None:
    return problem_of_storage(tensor) if has_address(tensor) else None


def _is_number(value: Tensor) -> bool:
    return value.is_complex() or value.is_floating_point()


def _kind(p: Tensor) -> str:
    return "complex" if p.is_complex() else "floating-point"
