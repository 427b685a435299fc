"""``torch.compile`` around the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import references
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from .common import Net, assert_close, changed, each, known_warnings, maker

pytestmark = known_warnings


def loss_of(net: Callable[[Tensor], Tensor]) -> Tensor:
    return net(torch.ones(2, 6)).sum()


@references.common_to_all
@each
def test_no_recompilation(name: str) -> None:
    """``torch.compile`` of the model beside the optimizer: one graph, whatever the schedule does."""
    torch._dynamo.reset()
    counter = CompileCounter()
    net, expected = Net(), Net()
    models: list[Callable[..., Tensor]] = [torch.compile(net, backend=counter), expected]
    optimizers = [maker(name)(one.parameters()) for one in (net, expected)]
    for step in range(5):
        for one, optimizer in zip(models, optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * 0.5**step
            optimizer.zero_grad()
            loss = partial(loss_of, one)
            loss().backward()
            optimizer.step(evaluate=loss)
    assert counter.frame_count == 1
    assert_close(net.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)  # float32


@references.common_to_all
@each
def test_no_recompilation_of_a_whole_training_step(name: str) -> None:
    """The optimizer's step inside of a compiled function: a break in the graph, no recompilation."""
    torch._dynamo.reset()
    counter = CompileCounter()
    net = Net()
    optimizer = maker(name)(net.parameters())

    @torch.compile(backend=counter)
    def training_step(x: Tensor) -> Tensor:
        loss = net(x).sum()
        loss.backward()
        optimizer.step(evaluate=lambda: loss_of(net))
        optimizer.zero_grad()
        return loss.detach()

    frames = []
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.5**step
        training_step(torch.ones(2, 6))
        frames.append(counter.frame_count)
    assert frames[2] == frames[-1], frames
    assert changed(net)
    torch._dynamo.reset()
