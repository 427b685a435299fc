"""Ways of stepping over a simulated link, and a model whose backward pass only sleeps.

Real autograd runs over layers that only sleep: each returns gradients that are ready-made, at the moment at which a
GPU would have them, and hooks, buckets, kernels and copies do what they always do.

Two models. ``gpt2``: GPT-2's 148 tensors with the tied embedding, whose gradient (77 of 249 MB) is complete only at the
very end; its head has its share of the time at the beginning. ``even``: as many weights in 48 equal layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import Make, deepspeed_adam, gpt2_shapes
from torch import Tensor, nn

import lightning_optim
from lightning_optim.offload import Detached, DetachedOptions
from lightning_optim.offload.link import SimulatedLink
from lightning_optim.offload.trace import Trace
from lightning_optim.offload.transport import Ticket, Transport

ADAMW: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01}


@dataclass(frozen=True)
class Layer:
    """Weights whose gradients are complete at one time.

    Attributes:
        shapes: Of the weights.
        share: Of the time of a pass.
    """

    shapes: Sequence[tuple[int, ...]]
    share: float


def gpt2(total: float | None) -> list[Layer]:
    """GPT-2 in order of the forward pass; all time is in the blocks and in the head, whose weight is the embedding."""
    shapes = gpt2_shapes(total)
    sizes = [math.prod(s) for s in shapes]
    blocks = [(shapes[i : i + 12], sum(sizes[i : i + 12])) for i in range(2, 146, 12)]
    flops = sizes[0] + sum(size for _, size in blocks)
    return [Layer(shapes[:2], 0.0), *(Layer(s, n / flops) for s, n in blocks), Layer(shapes[146:], sizes[0] / flops)]


def even(total: float | None) -> list[Layer]:
    """48 equal layers."""
    width = max(1, round(math.sqrt((total or sum(map(math.prod, gpt2_shapes(None)))) / 48)))
    return [Layer([(width, width), (width,)], 1 / 48)] * 48


MODELS: dict[str, Callable[[float | None], list[Layer]]] = {"gpt2": gpt2, "even": even}


#: Seconds by which a sleep may be too long (0.1 to 0.3 ms, seen here).
OVERSLEPT = 5e-4


@dataclass
class Clock:
    """When the gradients of the backward pass under way are complete, and a layer of the forward pass has computed.

    Attributes:
        begin: Of the backward pass.
        free: When a layer's turn in the forward pass can begin at the earliest: the one before it is done.
    """

    begin: float = 0.0
    free: float = 0.0

    def sleep_until(self, seconds: float) -> None:
        """After the beginning."""
        time.sleep(max(0.0, self.begin + seconds - time.perf_counter()))

    def compute(self, seconds: float) -> None:
        """A layer's turn in the forward pass: what sleeping takes too long is not added up, what is waited for is."""
        now = time.perf_counter()
        self.free = max(self.free, now - OVERSLEPT) + seconds
        time.sleep(max(0.0, self.free - now))


class _Sleeping(torch.autograd.Function):
    """A layer whose backward pass takes time, but no work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, due: float, grads: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.clock, ctx.due, ctx.grads = clock, due, grads
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        ctx.clock.sleep_until(ctx.due)
        # New tensors over the same memory: autograd takes them as they are, and copies nothing.
        return (outputs[0], None, None, None, *(g.detach() for g in ctx.grads))


class _Layer(nn.Module):
    """A layer that only sleeps."""

    def __init__(self, clock: Clock, weights: list[Tensor], grads: list[Tensor], forward: float, due: float) -> None:
        super().__init__()
        for number, w in enumerate(weights):
            self.register_parameter(f"weight{number}", nn.Parameter(w.clone()))
        self._clock, self._grads, self._seconds, self._due = clock, grads, forward, due

    def forward(self, x: Tensor) -> Tensor:
        self._clock.compute(self._seconds)
        return _Sleeping.apply(x, self._clock, self._due, self._grads, *self.parameters())


class Model:
    """The weights of one way of stepping, over gradients that all share.

    Args:
        layers: In order of the forward pass.
        weights: Of each layer; they are copied.
        grads: Of each layer.
        backward: Seconds of the backward pass.
        forward: Seconds of the forward pass.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        weights: list[list[Tensor]],
        grads: list[list[Tensor]],
        backward: float,
        forward: float = 0.0,
    ) -> None:
        self.grads = grads
        self._clock = Clock()
        shares = [layer.share for layer in layers]
        due = [backward * sum(shares[i:]) for i in range(len(shares))]
        self.module = nn.Sequential(
            *(_Layer(self._clock, weights[i], grads[i], forward * share, due[i]) for i, share in enumerate(shares))
        )
        self._output: Tensor | None = None

    @property
    def flat(self) -> list[nn.Parameter]:
        """All weights."""
        return list(self.module.parameters())

    def forward(self) -> float:
        """Run the forward pass; returns when it ended."""
        self._clock.free = time.perf_counter()
        self._output = self.module(torch.zeros((), requires_grad=True))
        return time.perf_counter()

    def backward(self) -> float:
        """Run the backward pass, after a forward pass; returns when it began."""
        assert self._output is not None
        self._clock.begin = time.perf_counter()
        self._output.backward()
        self._output = None
        return self._clock.begin


class Serial:
    """Everything after the backward pass, one thing after the other.

    Args:
        model: What is stepped.
        link: To the host.
        make: Makes the optimizer of the float32 masters.
        deepspeed: Copy each gradient in float32 while the backward pass runs, and step one flat partition.
    """

    def __init__(self, model: Model, link: SimulatedLink, make: Make, *, deepspeed: bool = False) -> None:
        self._model, self._link, self._deepspeed = model, link, deepspeed
        self._weights = [p.detach() for p in model.flat]
        master, grad, out, staging = (self._flat(t) for t in (torch.float32, torch.float32, *[torch.bfloat16] * 2))
        self._masters, self._wide, self._outgoing, self._staging = map(self._pieces, (master, grad, out, staging))
        torch._foreach_copy_(self._masters, self._weights)
        params = [nn.Parameter(t) for t in ([master] if deepspeed else self._masters)]
        for p, g in zip(params, [grad] if deepspeed else self._wide, strict=True):
            p.grad = g
        self._optimizer = make(params)
        self._copies: list[Ticket] = []
        if deepspeed:
            self._on_device = self._pieces(self._flat(torch.float32))
            for p, source, target in zip(model.flat, self._on_device, self._wide, strict=True):
                p.register_post_accumulate_grad_hook(partial(self._fetch, source, target))

    def _flat(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(sum(p.numel() for p in self._weights), dtype=dtype)

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p in self._weights])
        return [part.view(p.shape) for part, p in zip(parts, self._weights, strict=True)]

    def _fetch(self, source: Tensor, target: Tensor, p: Tensor) -> None:
        self._copies.append(self._link.fetch([source], [target], "gradient"))
        p.grad = None

    def prepare(self) -> None:
        """Before the backward pass: what the device will have cast."""
        if self._deepspeed:
            torch._foreach_copy_(self._on_device, [g for layer in self._model.grads for g in layer])

    def step(self) -> None:
        """Until the weights are there."""
        if self._deepspeed:
            for copy in self._copies:
                copy.wait()
            self._copies.clear()
        else:
            grads = [p.grad for p in self._model.flat if p.grad is not None]
            self._link.fetch(grads, self._staging, "gradients").wait()
            torch._foreach_copy_(self._wide, self._staging)
        self._optimizer.step()
        torch._foreach_copy_(self._outgoing, self._masters)
        self._link.send(self._outgoing, self._weights, "weights").wait()
        for p in self._model.flat:
            p.grad = None

    def finish(self) -> None:
        """Nothing is under way."""
        self._link.close()


class Ours:
    """A detached step.

    Args:
        model: What is stepped.
        link: To the host.
        trace: Where it is recorded what happens when.
        max_norm: Clip to this.
        overlap: Whether gradients leave as soon as they are complete.
        options: See :class:`~lightning_optim.offload.DetachedOptions`.
    """

    def __init__(
        self,
        model: Model,
        link: Transport,
        trace: Trace | None = None,
        *,
        max_norm: float | None = None,
        overlap: bool = True,
        **options: Any,
    ) -> None:
        self._optimizer = lightning_optim.AdamW(model.flat, engine="host", **ADAMW)
        module = model.module if options.get("wait") == "forward" else None
        self._max_norm = max_norm
        self.detached = Detached(
            self._optimizer, DetachedOptions(**options), transport=link, trace=trace, overlap=overlap, module=module
        )
        self.detached.expects = (None, max_norm)

    def prepare(self) -> None:
        """Before the backward pass."""

    def step(self) -> None:
        """Until gradients are gone and the weights are there.

        But those of the step before, if they come one step late; or none yet, if the forward pass waits for them.
        """
        self.detached.step(max_grad_norm=self._max_norm)
        self.detached.zero_grad()

    def finish(self) -> None:
        """Nothing is under way."""
        self.detached.close()


def serial_adam() -> tuple[str, Make]:
    """What steps the masters in the serial ways, and its name."""
    if (deepspeed := deepspeed_adam()) is not None:
        return "DeepSpeedCPUAdam", partial(deepspeed, **ADAMW)
    return "torch fused AdamW", partial(torch.optim.AdamW, fused=True, **ADAMW)
