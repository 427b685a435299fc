"""``wait="forward"``: weights land while the next forward pass begins, and nobody sees one too early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim.offload import Detached, DetachedOptions
from lightning_optim.offload.link import SimulatedLink
from lightning_optim.offload.transport import CopyTransport

#: Slow enough that weights are still on their way when the next forward pass begins.
SLOW = 2e5


class Borrowing(nn.Module):
    """Modules that are called, one whose weight another uses, and one weight that two modules have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)  # never calls its `out_proj`
        self.hidden = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.lent = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) * self.scale
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.hidden(x)
        return self.head(nn.functional.linear(x, self.lent.weight))


def train(options: DetachedOptions, transport: Any = None, *, call: bool = True, steps: int = 6) -> list[Tensor]:
    net = Borrowing().to(torch.bfloat16)
    optimizer = lightning_optim.AdamW(net.parameters(), lr=0.01)
    detached = Detached(optimizer, options, transport=transport, module=net if options.wait == "forward" else None)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(0, 11, (3, 5), generator=generator)
        if not call:
            detached.await_uncalled()
        output = net(tokens) if call else net.forward(tokens)
        output.float().square().mean().backward()
        detached.step(max_grad_norm=0.1)
        detached.zero_grad()
    detached.close()
    return [p.detach().clone() for p in net.parameters()]


def waiting(**options: Any) -> DetachedOptions:
    return DetachedOptions(bucket_mb=1e-5, wait="forward", **options)


@pytest.mark.parametrize("clip", ["exact", "speculative"])
@pytest.mark.parametrize("call", [True, False])
def test_the_same_bits(clip: Any, call: bool) -> None:
    expected = train(DetachedOptions(bucket_mb=1e-5, clip=clip))
    link = SimulatedLink(SLOW, 1e-3, jitter=1.0, poison=True)
    found = train(waiting(clip=clip), link, call=call)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_step_ends_before_the_weights_have_landed() -> None:
    net = Borrowing()
    optimizer = lightning_optim.SGD(net.parameters(), lr=0.01)
    link = SimulatedLink(SLOW, 1e-2, poison=True)
    detached = Detached(optimizer, waiting(), transport=link, module=net)
    there = []
    for _ in range(3):
        net(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
        detached.step()
        before = [p.detach().clone() for p in net.parameters()]
        detached.zero_grad()
        detached.publish()
        assert not any(p.isnan().any() for p in net.parameters())
        there.append(all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)))
    assert there == [False, False, False]
    detached.close()


def test_a_module_that_only_a_validation_calls_does_not_wait_for_itself() -> None:
    net = Borrowing()
    optimizer = lightning_optim.SGD(net.parameters(), lr=0.01)
    detached = Detached(optimizer, waiting(), transport=SimulatedLink(SLOW, 1e-2, poison=True), module=net)
    with torch.no_grad():
        net.lent(torch.ones(1, 8))
    for _ in range(3):
        output = net(torch.zeros(1, 2, dtype=torch.int64))
        assert not output.isnan().any()
        output.sum().backward()
        detached.step()
        detached.zero_grad()
    detached.close()


def test_layers_do_not_wait_for_later_ones() -> None:
    """While the first layer computes, weights of the last are still on their way."""
    net = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)])
    optimizer = lightning_optim.SGD(net.parameters(), lr=0.01)
    detached = Detached(
        optimizer,
        waiting(),
        transport=SimulatedLink(SLOW, 5e-3, poison=True),
        module=net,
    )
    first, *_, last = net.children()
    seen: list[Tensor] = []
    first.register_forward_hook(lambda *_: seen.append(last.get_parameter("weight").detach().clone()))
    used: list[Tensor] = []
    last.register_forward_hook(lambda *_: used.append(last.get_parameter("weight").detach().clone()))
    for _ in range(3):
        net(torch.ones(2, 16)).sum().backward()
        detached.step()
        detached.zero_grad()
    detached.close()
    assert [torch.equal(a, b) for a, b in zip(seen, used, strict=True)] == [True, False, False]


class Breaking(CopyTransport):
    """Fails at a number of sends."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def send(self, *args: Any, **kwargs: Any) -> Any:
        if self.failures:
            self.failures -= 1
            raise OSError("the link is down")
        return super().send(*args, **kwargs)


def test_what_goes_wrong_is_said_where_it_is_waited_for() -> None:
    net = nn.Linear(4, 4)
    transport = Breaking(0)
    optimizer = lightning_optim.SGD(net.parameters(), lr=0.01)
    detached = Detached(optimizer, waiting(), transport=transport, module=net)
    net(torch.ones(1, 4)).sum().backward()
    detached.step()
    detached.zero_grad()
    detached.publish()
    transport.failures = 1
    net(torch.ones(1, 4)).sum().backward()
    detached.step()
    with pytest.raises(OSError, match="the link is down"):
        net(torch.ones(1, 4))


@pytest.mark.parametrize("look", ["masters", "state", "step"])
def test_whoever_looks_waits(look: str) -> None:
    net = nn.Linear(4, 4)
    link = SimulatedLink(SLOW, 1e-2, poison=True)
    optimizer = lightning_optim.SGD(net.parameters(), lr=0.01)
    detached = Detached(optimizer, waiting(), transport=link, module=net)
    looks: dict[str, Callable[[], Any]] = {
        "masters": detached.masters,
        "state": detached.read_weights,
        "step": detached.step,
    }
    for _ in range(2):
        net(torch.ones(1, 4)).sum().backward()
        detached.step()
        detached.zero_grad()
    looks[look]()
    assert not any(p.isnan().any() for p in net.parameters())
    detached.close()


def test_hooks_are_removed() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    optimizer = lightning_optim.SGD(net.parameters(), lr=0.01)
    detached = Detached(optimizer, waiting(), module=net)
    assert net._forward_pre_hooks
    assert net[0]._forward_pre_hooks
    assert not net[1]._forward_pre_hooks
    detached.close()
    assert not net._forward_pre_hooks
    assert not net[0]._forward_pre_hooks


def test_it_needs_the_module() -> None:
    with pytest.raises(ValueError, match="wait='forward' needs module="):
        Detached(lightning_optim.SGD(nn.Linear(2, 2).parameters(), lr=0.01), waiting())


@pytest.mark.parametrize("options", [{"wait": "later"}, {"wait": "forward", "delay_one_step": True}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"wait='{options['wait']}'"):
        DetachedOptions(**options)
