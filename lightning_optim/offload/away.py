"""A tensor that stands in for a gradient while that is in host memory and more is to be added to it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_optim.stepping.shards import local

if TYPE_CHECKING:
    from lightning_optim.offload.buckets import OffloadBucket


class Kept:
    """A gradient that is on the host, and on the device as well once somebody has used it there.

    Args:
        bucket: The bucket that has it; not kept alive.
        p: The parameter whose gradient it is; not kept alive.
    """

    def __init__(self, bucket: OffloadBucket, p: Tensor) -> None:
        self._bucket, self._param = weakref.ref(bucket), weakref.ref(p)
        self._value: Tensor | None = None
        self._seen = 0
        self.is_lent = False  # whether others have it, who may change it or pass it on

    def value(self) -> Tensor:
        """The gradient, on the device.

        Raises:
            RuntimeError: The gradient was forgotten.
        """
        if self._value is None:
            with torch.inference_mode(False), torch.no_grad():
                p, value = self._on_host()
                self._value = torch.empty_like(p, requires_grad=False).copy_(value)
                self._seen = self._value._version
        return self._value

    def multiply(self, factor: Tensor | float) -> None:
        """Multiply the gradient: on the host, unless it has come back to the device already.

        Args:
            factor: A number, or a tensor with one element, for which the host waits.
        """
        if self._value is not None:
            self._value.mul_(factor)
            return
        with torch.inference_mode(False), torch.no_grad():
            _, value = self._on_host()
            local(value).mul_(factor.cpu() if isinstance(factor, Tensor) else factor)

    def _on_host(self) -> tuple[Tensor, Tensor]:
        """The parameter, and the gradient in host memory, once it is there."""
        bucket, p = self._bucket(), self._param()
        if bucket is None or p is None or bucket.away_of(p) is not self:
            raise RuntimeError(
                "detached: this gradient was in host memory, and has been forgotten since; valid: a copy of it, "
                "made while it was there (p.grad.clone())"
            )
        for job in bucket.arrivals:
            job.result()
        return p, bucket.gradient(bucket.number_of[p])

    def changed(self) -> Tensor | None:
        """The gradient, if somebody may have changed it on the device."""
        value = self._value
        return value if value is not None and (self.is_lent or value._version != self._seen) else None


class Away(Tensor):
    """Stands for a gradient that is on its way to the host, or there.

    It has no memory of its own. Reading or changing it fetches the gradient back. If it is changed, or replaced by
    another tensor or None, the step follows that, as it does when gradients stay on the device.

    Args:
        kept: The gradient.
        p: The parameter whose gradient it is.
    """

    kept: Kept

    @staticmethod
    def __new__(cls, kept: Kept, p: Tensor) -> Away:
        """See the class."""
        made: Any = Tensor._make_wrapper_subclass(cls, p.shape, strides=p.stride(), dtype=p.dtype, device=p.device)
        made.kept = kept
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch declares it as a method of instances
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the operator with the gradient itself."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0].kept, args[0])
        # At this level, changes raise no version counter, and views are not tracked.
        lent = func._schema.is_mutable or func.is_view

        def found(value: Any) -> Any:
            if not isinstance(value, Away):
                return value
            value.kept.is_lent |= lent
            return value.kept.value()

        return func(*tree_map(found, args), **tree_map(found, kwargs or {}))

    def __deepcopy__(self, memo: Any) -> Tensor:
        """Copy the gradient itself, as an ordinary tensor."""
        return self.kept.value().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the gradient itself, as an ordinary tensor."""
        return self.kept.value().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """The gradient as text."""
        return repr(self.kept.value())

    def numpy(self, *, force: bool = False) -> Any:
        """The gradient as a NumPy array."""
        return self._lent().numpy(force=force)

    def tolist(self) -> Any:
        """The gradient as a list."""
        return self.kept.value().tolist()

    def data_ptr(self) -> int:
        """The gradient's address."""
        return self._lent().data_ptr()

    def untyped_storage(self) -> Any:
        """The gradient's storage."""
        return self._lent().untyped_storage()

    def _lent(self) -> Tensor:
        self.kept.is_lent = True
        return self.kept.value()
