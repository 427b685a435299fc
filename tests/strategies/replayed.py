"""What the tests of replayed windows share: a model with noise and batch norm, and its training written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from foreign import Foreign
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_optim
from lightning_optim.optimizers.sam import SAM

from .common import dataset, model_class

#: Stepped by our engines, by our engines in torch's place, and by itself. In steps that are small enough for runs in
#: another order of operations to stay together.
BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "ours": partial(lightning_optim.AdamW, lr=0.03, weight_decay=0.1),
    "torch SGD": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "foreign": partial(Foreign, lr=0.01),
}


def noisy_network() -> nn.Sequential:
    """Without a bias before the norm, whose gradient would be nothing but rounding, which Adam makes large."""
    net = nn.Sequential(nn.Linear(6, 7, bias=False), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 1))
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.5
    return net


def seed(batch: int) -> None:
    """The noise of a batch, in whatever order things are done."""
    torch.manual_seed(1000 + batch)


@cache
def noisy_class(root: str = "lightning.pytorch") -> Any:
    """A model with dropout, batch norm, logs and counted hooks, of either root."""

    class Noisy(model_class(root)):  # type: ignore[misc]
        def __init__(self, make: Any = None, batch: int = 4) -> None:
            super().__init__(make, batch)
            self.net = noisy_network()
            self.evaluated = 0
            self.called: list[str] = []

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            seed(batch_idx)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            self.evaluated += 1
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_step=True, on_epoch=True)
            return {"loss": loss, "more": batch_idx}

        def on_before_zero_grad(self, optimizer: Any) -> None:
            self.called.append("zero_grad")

        def on_before_backward(self, loss: Tensor) -> None:
            self.called.append("before_backward")

        def on_after_backward(self) -> None:
            self.called.append("after_backward")

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(dataset(32), batch_size=self.batch)

        def configure_optimizers(self) -> Any:
            return self.make(self.parameters())

    return Noisy


def sam(name: str = "ours", **options: Any) -> Any:
    return partial(SAM, base=BASES[name], **{"rho": 0.5} | options)


class ByHand:
    """Training with SAM as a plain PyTorch loop, in which each window is evaluated twice.

    Args:
        base: Makes the optimizer inside.
        net: What is trained.
        rho: Length of the perturbation.
        adaptive: ASAM.
        accumulate: Batches in a window.
        clip: Limit of the global norm of the second gradient.
        scaler: For float16.
        overflows: Batches whose loss is too large for it.
    """

    def __init__(
        self,
        base: Any,
        net: nn.Module | None = None,
        *,
        rho: float = 0.5,
        adaptive: bool = False,
        accumulate: int = 1,
        clip: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        overflows: Iterable[int] = (),
    ) -> None:
        self.net = noisy_network() if net is None else net
        self.optimizer = base(self.net.parameters())
        self.rho, self.adaptive, self.accumulate, self.clip = rho, adaptive, accumulate, clip
        self.scaler, self.overflows = scaler, set(overflows)
        self.weights: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def gradients(self, window: list[tuple[int, Tensor, Tensor]]) -> list[Tensor]:
        """The mean gradient of a window, in float32 and not scaled."""
        self.net.zero_grad()
        for index, x, y in window:
            seed(index)
            with torch.autocast("cpu", torch.float16, enabled=self.scaler is not None):
                output = self.net(x)
                loss = nn.functional.mse_loss(output.to(y.dtype), y)
            loss = loss * 1e30 if index in self.overflows else loss
            self.losses.append(loss.item())
            loss = loss / self.accumulate
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        return [p.grad / scale for p in self.net.parameters() if p.grad is not None]

    def step(self, window: list[tuple[int, Tensor, Tensor]]) -> None:
        params = list(self.net.parameters())
        first = self.gradients(window)
        buffers = copy.deepcopy(dict(self.net.named_buffers()))
        before = [p.detach().clone() for p in params]
        sizes = [p.detach().abs() + 0.01 if self.adaptive and p.ndim > 1 else torch.ones(()) for p in params]
        norm = torch.stack([(t * g).double().square().sum() for t, g in zip(sizes, first, strict=True)]).sum().sqrt()
        if norm.isfinite():
            with torch.no_grad():
                for p, t, g in zip(params, sizes, first, strict=True):
                    p.add_((self.rho * t * t * g / (norm + 1e-12)).float())
        seen = len(self.losses)
        second = self.gradients(window)
        del self.losses[seen:]
        with torch.no_grad():
            for p, old, g in zip(params, before, second, strict=True):
                p.copy_(old)
                p.grad = g
            for name, buffer in self.net.named_buffers():
                buffer.copy_(buffers[name])
        finite = all(g.isfinite().all() for g in second)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(params, self.clip)
        if self.scaler is None or finite:
            self.optimizer.step()
        if self.scaler is not None and not finite:
            self.scaler.update(self.scaler.get_scale() / 2)

    def fit(self, epochs: int = 1, batch: int = 4, samples: int = 32) -> ByHand:
        x, y = dataset(samples).tensors
        batches = [(i, x[at : at + batch], y[at : at + batch]) for i, at in enumerate(range(0, samples, batch))]
        for _ in range(epochs):
            for at in range(0, len(batches), self.accumulate):
                window = batches[at : at + self.accumulate]
                before = self._noted()
                self.weights += [before] * (len(window) - 1)
                self.step(window)
                self.weights.append(self._noted())
        return self

    def _noted(self) -> dict[str, Tensor]:
        return {f"net.{name}": p.detach().clone() for name, p in self.net.named_parameters()}


def assert_weights(found: Any, expected: ByHand, **tolerance: Any) -> None:
    """The weights after every batch."""
    assert len(found.weights) == len(expected.weights) > 0
    for batch, (ours, theirs) in enumerate(zip(found.weights, expected.weights, strict=True)):
        for name, value in ours.items():
            message = f"batch {batch}, {name}: {value} instead of {theirs[name]}"
            torch.testing.assert_close(value, theirs[name], **tolerance, msg=message)
