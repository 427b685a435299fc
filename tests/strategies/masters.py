"""The reference of the detached strategies: float32 masters under bfloat16 weights, by torch's own optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .common import Model

SHAPES = [(6, 7), (7,), (3, 2, 2), (1,), (40, 3)]


class ByHand(torch.optim.Optimizer):
    """Steps float32 masters with gradients that are added up in float32, and rounds them to the weights.

    Args:
        params: The weights.
        make: Builds torch's optimizer of the masters.
        max_norm: Clip to this.
    """

    def __init__(self, params: Iterable[Tensor], make: Callable[[Any], Any], max_norm: float | None = None) -> None:
        super().__init__(list(params), {"lr": 0.0})
        self.weights: list[Tensor] = self.param_groups[0]["params"]
        self.masters = [nn.Parameter(p.detach().float()) for p in self.weights]
        self.inner = make(self.masters)
        self.param_groups[0]["lr"] = self.inner.param_groups[0]["lr"]
        self.max_norm = max_norm
        for p, master in zip(self.weights, self.masters, strict=True):
            p.register_post_accumulate_grad_hook(self._taker(master))

    @staticmethod
    def _taker(master: Tensor) -> Callable[[Tensor], None]:
        def take(p: Tensor) -> None:
            assert p.grad is not None
            grad, p.grad = p.grad.float(), None
            master.grad = grad if master.grad is None else master.grad + grad

        return take

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.masters, self.max_norm)
        self.inner.step()
        self.inner.zero_grad()
        with torch.no_grad():
            for p, master in zip(self.weights, self.masters, strict=True):
                p.copy_(master)
        return loss


class Slopes(nn.Module):
    """A sum of weights, each times a number that comes from the batch."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES)

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros((), dtype=torch.float32)
        for number, p in enumerate(self.weights):
            slope = torch.cos(x.float().sum() * (1 + torch.arange(p.numel()) + 10 * number)).reshape(p.shape)
            total = total + (p.float() * slope).sum()
        return total


class Straight(Model):
    """Gradients that do not depend on the weights: otherwise one weight that rounds the other way moves all others."""

    def __init__(self, make: Any = None, batch: int = 2) -> None:
        super().__init__(make, batch)
        self.net = Slopes()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = self.net(batch[0])
        return loss * 1e30 if batch_idx in self.overflows else loss
