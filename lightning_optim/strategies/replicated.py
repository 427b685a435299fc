"""For strategies over DDP: gradients of layers that are unfrozen after its setup are averaged over processes, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.control.unreduced import Unreduced

#: Stands for the base classes that come after this one: ours, then ``DDPStrategy`` of either root of Lightning.
_Strategy: Any = object


class Replicated(_Strategy):
    """Averages the gradients that DDP does not know of, at the end of a backward pass, before hooks and clipping."""

    _unreduced: Unreduced | None = None  # from the time when DDP is set up to the end of the training

    def configure_ddp(self) -> None:
        """Set DDP up as Lightning does, and take note of what it knows."""
        super().configure_ddp()
        self._unreduced = Unreduced(self.model)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Prepare to average after a backward pass, in automatic and in manual optimization."""
        super().pre_backward(closure_loss)
        self._average_after(closure_loss)

    def teardown(self) -> None:
        """Drop the reference to the module."""
        self._unreduced = None
        super().teardown()

    def _backward_again(self, loss: Tensor, optimizer: Optimizer) -> None:
        self._average_after(loss)
        super()._backward_again(loss, optimizer)

    def _average(self, tensors: list[Tensor]) -> None:
        if self._unreduced is not None:
            self._unreduced.average_tensors(tensors)

    @contextmanager
    def _without_reductions(self) -> Iterator[None]:
        ddp = self.model
        # After a forward pass without a reduction, DDP does not synchronize the buffers before the next one.
        syncs_buffers = ddp.require_forward_param_sync
        try:
            with self.block_backward_sync():
                yield
        finally:
            ddp.require_forward_param_sync = syncs_buffers

    def _average_after(self, loss: Tensor) -> None:
        if self._unreduced is not None:
            self._unreduced.average_after(loss, self.optimizers)
