"""Gradients as this process has them: whole, its part of a DTensor, or the values of a sparse tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optim.stepping.shards import Shards, all_reduced, is_distributed, local, shards_of


@dataclass(frozen=True)
class Gradient:
    """One parameter's gradient.

    Attributes:
        key: The parameter's name, or its number among those that were given.
        param: The parameter.
        values: This process's part as a dense, real tensor; what is written to it is written to the gradient.
        shards: The mesh dimensions over which the gradient is divided.
        row_shards: Those of them that divide it by rows, which leaves the units of AGC whole.
    """

    key: str
    param: Tensor
    values: Tensor
    shards: Shards = ()
    row_shards: Shards = ()

    @property
    def weights(self) -> Tensor:
        """The weights of which :attr:`values` is the gradient."""
        gradient, weights = self.param.grad, local(self.param.detach())
        if gradient is not None and gradient.layout is torch.sparse_coo:
            weights = weights[tuple(gradient._indices())]
        return torch.view_as_real(weights) if weights.is_complex() else weights

    @property
    def is_one_unit(self) -> bool:
        """Whether this is a bias or a gain, all of which is one unit."""
        return self.param.ndim < 2

    @property
    def unit_shards(self) -> Shards:
        """The mesh dimensions over which units are divided."""
        return tuple(where for where in self.shards if where not in self.row_shards)

    @property
    def units(self) -> int:
        """How many units there are, over all shards."""
        if self.is_one_unit:
            return 1
        return self.param.shape[0] if self.shards else self.values.shape[0]

    @property
    def elements(self) -> int:
        """How many numbers there are, over all shards."""
        return self.param.numel() * (2 if self.param.is_complex() else 1) if self.shards else self.values.numel()


def gradients_of(params: Iterable[Tensor], names: Mapping[Tensor, str]) -> list[Gradient]:
    """The gradients of those parameters that have one.

    Args:
        params: The parameters.
        names: Their names, where they are known.

    Raises:
        RuntimeError: A gradient is a DTensor whose parts are still to be summed.
    """
    return [_gradient(names.get(p, str(number)), p) for number, p in enumerate(params) if p.grad is not None]


def _gradient(key: str, p: Tensor) -> Gradient:
    gradient = p.grad
    assert gradient is not None  # noqa: S101
    shards: Shards = ()
    by_rows: Shards = ()
    if gradient.layout is torch.sparse_coo:
        if not gradient.is_coalesced():
            gradient = p.grad = gradient.coalesce()
        values = gradient._values()
    else:
        values = local(gradient)
    if is_distributed(gradient):
        placements = gradient.placements  # type: ignore[attr-defined] # of a DTensor
        if any(placement.is_partial() for placement in placements):
            raise RuntimeError(
                f"the gradient of {key} is a DTensor whose parts are still to be summed: {placements}; redistribute it "
                "before it is clipped"
            )
        shards = shards_of(gradient)
        by_rows = tuple((mesh, dim) for mesh, dim in shards if p.ndim > 1 and placements[dim].dim == 0)
    return Gradient(key, p, torch.view_as_real(values) if values.is_complex() else values, shards, by_rows)


def tensor_norms(gradients: Sequence[Gradient]) -> Tensor:
    """The norm of each gradient, all shards included, on the first one's device.

    Args:
        gradients: At least one gradient.
    """
    norms = _norms([gradient.values for gradient in gradients])
    return stacked(_over_shards(norms, [gradient.shards for gradient in gradients]))


def unit_norms(tensors: Sequence[Tensor], gradients: Sequence[Gradient]) -> list[Tensor]:
    """The norms of the units of each tensor: one number for each row of this process's part.

    Args:
        tensors: Each gradient's values, or its weights.
        gradients: The gradients.
    """
    norms = []
    for tensor, gradient in zip(tensors, gradients, strict=True):
        dims = None if gradient.is_one_unit else tuple(range(1, tensor.ndim))
        norms.append(torch.linalg.vector_norm(tensor, dim=dims, dtype=_math(tensor)).reshape(-1))
    return _over_shards(norms, [gradient.unit_shards for gradient in gradients])


def norm_of_units(units: Sequence[Tensor], gradients: Sequence[Gradient]) -> Tensor:
    """The global norm.

    Args:
        units: The norms of each gradient's units.
        gradients: The gradients.
    """
    return torch.linalg.vector_norm(
        stacked(_over_shards(_norms(units), [gradient.row_shards for gradient in gradients]))
    )


def share(counts: Sequence[Tensor], shards: Sequence[Shards], of: int) -> Tensor:
    """The share that counted things have of all.

    Args:
        counts: How many each process has of each gradient.
        shards: The mesh dimensions over which each gradient's are divided.
        of: How many things there are in all.
    """
    return stacked(_summed(counts, shards)).sum().float() / of


def nonfinite(gradients: Sequence[Gradient]) -> list[str]:
    """The keys of gradients that are infinite or NaN somewhere, on any process; this waits for the device."""
    counts = [(~gradient.values.isfinite()).sum() for gradient in gradients]
    found = stacked(_summed(counts, [gradient.shards for gradient in gradients])).tolist()
    return [gradient.key for gradient, count in zip(gradients, found, strict=True) if count]


def scale(gradients: Sequence[Gradient], factor: Tensor) -> None:
    """Multiply all gradients by one number, which stays on its device."""
    values = [gradient.values for gradient in gradients]
    for indices in _kinds(values):
        part = [values[index] for index in indices]
        torch._foreach_mul_(part, factor.to(part[0].device, non_blocking=True))


def scale_each(gradients: Sequence[Gradient], factors: Sequence[Tensor]) -> None:
    """Multiply each gradient by its own factor: a number, or one that broadcasts."""
    here = [factor.to(g.values.device, non_blocking=True) for factor, g in zip(factors, gradients, strict=True)]
    torch._foreach_mul_([gradient.values for gradient in gradients], here)


def clamp(gradients: Sequence[Gradient], limit: float) -> None:
    """Clip every element to ``[-limit, limit]``."""
    values = [gradient.values for gradient in gradients]
    for indices in _kinds(values):
        part = [values[index] for index in indices]
        torch._foreach_clamp_min_(part, -limit)
        torch._foreach_clamp_max_(part, limit)


def stacked(numbers: Sequence[Tensor]) -> Tensor:
    """Numbers as one tensor on the first one's device."""
    return torch.stack([number.to(numbers[0].device, non_blocking=True) for number in numbers])


def _kinds(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The indices of tensors of one device and type each, on which ``torch._foreach_*`` are fast."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(index)
    return list(kinds.values())


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each tensor, as this process has it."""
    norms = list(tensors)
    for indices in _kinds(tensors):
        kind = [tensors[index] for index in indices]
        for index, norm in zip(indices, torch._foreach_norm(kind, 2, dtype=_math(kind[0])), strict=True):
            norms[index] = norm
    return norms


def _over_shards(norms: Sequence[Tensor], shards: Sequence[Shards]) -> list[Tensor]:
    """Norms of whole tensors, from those of this process's parts."""
    if not any(shards):
        return list(norms)
    # In float64, whose squares neither overflow nor vanish.
    whole = _summed(
        [norm.double().square() if where else norm for norm, where in zip(norms, shards, strict=True)], shards
    )
    kinds = zip(whole, norms, shards, strict=True)
    return [total.sqrt().to(norm.dtype) if where else norm for total, norm, where in kinds]


def _summed(parts: Sequence[Tensor], shards: Sequence[Shards]) -> list[Tensor]:
    """Sums over all processes that have a part, by one exchange for all that are divided alike."""
    sums = list(parts)
    alike: dict[Shards, list[int]] = {}
    for index, where in enumerate(shards):
        if where:
            alike.setdefault(where, []).append(index)
    for where, indices in alike.items():
        total = all_reduced(torch.cat([parts[index].reshape(-1) for index in indices]), where)
        for index, part in zip(indices, total.split([parts[index].numel() for index in indices]), strict=True):
            sums[index] = part.reshape(parts[index].shape)
    return sums


def _math(tensor: Tensor) -> torch.dtype:
    """The type in which norms are computed: squares of float16 overflow, and sums in bfloat16 stand still."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
