"""``wait="forward"``: whatever breaks off the waiting, compiles the model or copies it, nobody sees old weights."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim.offload import Detached
from lightning_optim.offload.link import SimulatedLink
from lightning_optim.offload.transport import CopyTransport, Ticket

from .common import known_warnings
from .test_landing import SLOW, waiting

pytestmark = known_warnings


class Held(CopyTransport):
    """Sends when it may."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.may.set()

    def send(self, *args: Any, **kwargs: Any) -> Ticket:
        self.may.wait()
        return super().send(*args, **kwargs)


def one(net: Any, detached: Detached) -> None:
    net(torch.ones(1, 4)).sum().backward()
    detached.step()
    detached.zero_grad()


def test_an_interrupt_while_a_module_waits() -> None:
    torch.manual_seed(0)
    net, transport = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Held()
    optimizer = lightning_optim.SGD(net.parameters(), lr=1.0)
    detached = Detached(optimizer, waiting(), transport=transport, module=net)
    for _ in range(2):
        one(net, detached)
    net(torch.ones(1, 4)).sum().backward()
    transport.may.clear()
    detached.step()
    detached.zero_grad()
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        net(torch.ones(1, 4))
    threading.Timer(0.1, transport.may.set).start()
    with torch.no_grad():
        seen = net(torch.ones(1, 4))  # waits
        detached.publish()
        assert torch.equal(seen, net(torch.ones(1, 4)))
    detached.close()


def test_an_interrupt_while_a_step_waits() -> None:
    ends = []
    for interrupted in (True, False):
        torch.manual_seed(0)
        net, transport = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Held()
        optimizer = lightning_optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        detached = Detached(optimizer, transport=transport)
        one(net, detached)
        net(torch.ones(1, 4)).sum().backward()
        if interrupted:
            transport.may.clear()
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            threading.Timer(0.3, transport.may.set).start()
            with pytest.raises(KeyboardInterrupt):
                detached.step()
        else:
            detached.step()
        detached.zero_grad()
        one(net, detached)
        ends.append([p.detach().clone() for p in net.parameters()])
        detached.close()
    assert all(map(torch.equal, *ends))


def test_copies_and_pickles_of_a_module_have_hooks_that_do_nothing() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    optimizer = lightning_optim.SGD(net.parameters(), lr=1.0)
    detached = Detached(optimizer, waiting(), transport=SimulatedLink(SLOW, 1e-2), module=net)
    for _ in range(2):
        one(net, detached)
    detached.last = False
    net(torch.ones(1, 4)).sum().backward()
    landing: Any = detached._landing
    others: list[Any] = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]  # noqa: S301 # our own
    for other in others:
        called = set(landing._called)
        other(torch.ones(1, 4))
        assert landing._called == called
        assert torch.equal(other.get_parameter("0.weight"), net.get_parameter("0.weight"))
    copy.deepcopy(optimizer)
    pickle.dumps(optimizer)
    detached.close()


def _compiled(how: str, net: nn.Sequential) -> Any:
    if how == "function":
        return torch.compile(lambda x: net(x), backend="eager")
    if how == "part":
        net[1] = torch.compile(net[1], backend="eager")  # type: ignore[assignment]
    if how == "in place":
        net[1].compile(backend="eager")
    if how == "whole":
        return torch.compile(net, backend="eager")
    return net


@pytest.mark.parametrize("how", ["function", "part", "in place", "whole"])
def test_what_is_compiled_waits_as_well(how: str) -> None:
    ends: list[list[Tensor]] = []
    for kind in (how, "not"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 2))
        call = _compiled(kind, net)
        optimizer = lightning_optim.AdamW(net.parameters(), lr=0.01)
        for _ in range(2):  # the second one finds what was compiled with the hooks of the first
            link = SimulatedLink(SLOW, 1e-3, poison=True)
            module = call if kind == "whole" else net
            detached = Detached(optimizer, waiting(), transport=link, module=module)
            for step in range(3):
                if kind == "function":
                    detached.await_uncalled()
                call(torch.full((2, 4), float(step))).square().mean().backward()
                detached.step()
                detached.zero_grad()
            detached.close()
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_graph_that_must_be_whole_says_why_it_cannot_be() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    optimizer = lightning_optim.SGD(net.parameters(), lr=1.0)
    detached = Detached(optimizer, waiting(), module=net)
    call = torch.compile(lambda x: net(x), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="with wait='forward' modules wait for their weights"):
        call(torch.ones(1, 4))
    detached.close()
