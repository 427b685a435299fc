"""Copies of what the forward passes of a module change, to be put back."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.engines.memory import aliased, is_plain


@dataclass(frozen=True)
class _Value:
    """Something that a module keeps: a buffer, or part of a metric's state."""

    store: dict[str, Any]
    key: str
    value: Any
    copy: Any

    def put_back(self) -> None:
        self.store[self.key] = self.value  # the same object, since others may hold it, as DDP holds buffers
        if isinstance(self.value, Tensor):
            self.value.copy_(self.copy)
        elif isinstance(self.value, list):
            self.value[:] = self.copy


class ModuleState:
    """Copies of what the forward passes of a module change besides gradients: its buffers, such as batch norm's.

    Buffers that share memory with a parameter are left out: perturbing weights, and restoring them, is done elsewhere.

    Args:
        module: The module.
        before: An earlier state of the module, whose copies are shared where nothing has changed since.
        metrics: Whether to include the states of the module's ``torchmetrics``.

    >>> norm = nn.BatchNorm1d(2)
    >>> state = ModuleState(norm)
    >>> _ = norm(torch.ones(3, 2))
    >>> norm.running_mean
    tensor([0.1000, 0.1000])
    >>> state.put_back()
    >>> norm.running_mean
    tensor([0., 0.])
    """

    @torch.no_grad()
    def __init__(self, module: nn.Module, before: ModuleState | None = None, *, metrics: bool = False) -> None:
        self._parts: dict[nn.Module, tuple[Any, list[_Value]]] = {}
        self._shared = _shared_storages(module)
        weights: dict[int, list[Tensor]] = {}
        for p in module.parameters():
            weights.setdefault(_storage(p), []).append(p)
        torchmetrics = sys.modules.get("torchmetrics") if metrics else None
        for part in module.modules():
            if part._buffers:
                mark = _mark(part, self._shared)
                known = None if before is None else before._parts.get(part)
                if known is not None and known[0] == mark:
                    self._parts[part] = known
                else:
                    names = [name for name, buffer in part._buffers.items() if not _is_in(weights, buffer)]
                    self._parts[part] = mark, _values(part._buffers, names)
        self._metrics: list[_Value] = []
        if torchmetrics is not None:
            for part in module.modules():
                if isinstance(part, torchmetrics.Metric):
                    names = [*part._defaults, "_update_count", "_computed", "_forward_cache"]
                    self._metrics += _values(part.__dict__, [name for name in names if name in part.__dict__])

    @torch.no_grad()
    def put_back(self) -> None:
        """Set the module's buffers, and its metrics, to these values."""
        for part, (mark, values) in self._parts.items():
            if _mark(part, self._shared) != mark:
                for value in values:
                    value.put_back()
        for value in self._metrics:
            value.put_back()


def _values(store: dict[str, Any], names: Iterable[str]) -> list[_Value]:
    return [_Value(store, name, store[name], _copy(store[name])) for name in names]


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value


def _mark(part: nn.Module, shared: set[int]) -> list[Any]:
    """A mark that differs once any of a module's buffers has changed.

    It is for all buffers together: batch norm does not raise the version counters of its averages, but does raise that
    of its counter of batches.

    Args:
        part: The module.
        shared: Storages that several tensors share, each with a version counter of its own.
    """
    # An inference tensor has no version: a new object, which equals only itself, marks it as changed.
    return [
        None
        if buffer is None
        else (id(buffer), object() if buffer.is_inference() or _storage(buffer) in shared else buffer._version)
        for buffer in part._buffers.values()
    ]


def _storage(tensor: Tensor | None) -> int:
    """The address of a tensor's memory; 0: it has none."""
    if tensor is None or not is_plain(tensor) or tensor.layout is not torch.strided:
        return 0
    return tensor.untyped_storage().data_ptr()


def _shared_storages(module: nn.Module) -> set[int]:
    """The storages that several buffers of a module share (tied through ``.data``, or views)."""
    counts = Counter(map(_storage, module.buffers()))
    return {storage for storage, times in counts.items() if times > 1 and storage}


def _is_in(weights: dict[int, list[Tensor]], buffer: Tensor | None) -> bool:
    """Whether a buffer shares memory with a weight, at least in part."""
    storage = _storage(buffer)
    return bool(storage) and any(aliased([buffer, p]) for p in weights.get(storage, ()) if buffer is not None)
