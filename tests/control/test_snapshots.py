"""Snapshots: bit for bit, in buffers that stay, complete before the step; and of everything that a step changes."""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import optimizer_info
from lightning_optim.control.rollback import snapshots as module
from lightning_optim.control.rollback.snapshots import Snapshots
from lightning_optim.control.rollback.step_snapshot import StepSnapshot
from lightning_optim.engines.host_memory import HostMemory
from lightning_optim.registry import OPTIMIZERS

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*the host engine cannot be used .no C compiler:lightning_optim.warnings.LightningOptimWarning"
)

NAN = torch.tensor([0x7FC00001, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)  # payloads are bits too


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8)


def forms() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(6, 8, generator=generator)
    return [
        wide.clone(),
        wide.t().contiguous().t(),
        torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
        wide.clone()[::2, ::3],
        wide.to(torch.bfloat16),
        wide.to(torch.complex64),
        torch.arange(5),
        torch.tensor(True),
        torch.tensor(3.0),
        torch.empty(0, 4),
        NAN.clone(),
        nn.Parameter(wide.clone()),
    ]


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("where", ["device", "host"])
def test_every_form_comes_back(background: bool, where: Any) -> None:
    tensors = forms()
    snapshot = Snapshots(lambda: tensors, where)
    for _ in range(2):
        before = [bits(tensor) for tensor in tensors]
        snapshot.begin(background=background)
        snapshot.wait()
        with torch.no_grad():
            for tensor in tensors:
                tensor.fill_(1)
        restored = snapshot.restore()
        assert all(one is other for one, other in zip(restored, tensors, strict=True))
        assert all(torch.equal(bits(tensor), then) for tensor, then in zip(tensors, before, strict=True))
    assert snapshot.nbytes == sum(tensor.nbytes for tensor in tensors)
    snapshot.release()
    assert snapshot.nbytes == 0


def test_buffers_are_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, made = forms(), []
    stock = torch.empty_like

    def noted(like: Tensor) -> Tensor:
        made.append(like.shape)
        return stock(like)

    monkeypatch.setattr(torch, "empty_like", noted)
    snapshot = Snapshots(lambda: tensors)
    for _ in range(3):
        snapshot.begin()
    assert len(made) == len(tensors)
    tensors.insert(0, torch.ones(9))  # what was there keeps its buffer, wherever it is in the list
    snapshot.begin()
    assert made[len(tensors) - 1 :] == [torch.Size([9])]
    del tensors[3:]
    snapshot.begin()
    assert snapshot.nbytes == sum(tensor.nbytes for tensor in tensors)
    snapshot.release()


def test_the_copy_is_made_by_another_thread_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    may_copy, where = threading.Event(), []
    stock = module._copy

    def slow(to: list[Tensor], of: list[Tensor]) -> None:
        where.append(threading.current_thread())
        assert may_copy.wait(60)
        stock(to, of)

    monkeypatch.setattr(module, "_copy", slow)
    tensor = torch.ones(3)
    snapshot = Snapshots(lambda: [tensor])
    snapshot.begin()  # returns although nothing can be copied yet
    waiting = threading.Thread(target=snapshot.wait)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    may_copy.set()
    waiting.join(60)
    assert not waiting.is_alive()
    assert where != [threading.main_thread()]
    tensor.zero_()
    snapshot.restore()
    assert tensor.tolist() == [1, 1, 1]
    snapshot.release()


def test_an_error_in_the_thread_is_raised_where_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(to: list[Tensor], of: list[Tensor]) -> None:
        raise RuntimeError("no such memory")

    monkeypatch.setattr(module, "_copy", broken)
    snapshot = Snapshots(lambda: [torch.ones(3)])
    snapshot.begin()
    with pytest.raises(RuntimeError, match="no such memory"):
        snapshot.wait()
    snapshot.release()


def test_tensors_that_are_gone_are_made_anew_and_not_kept_alive() -> None:
    tensors = [torch.ones(3)]
    snapshot = Snapshots(lambda: tensors)
    snapshot.begin()
    snapshot.wait()
    tensors.clear()
    gc.collect()
    (found,) = snapshot.restore()
    assert found.tolist() == [1, 1, 1]
    found.zero_()
    assert snapshot.restore()[0].tolist() == [1, 1, 1]
    snapshot.release()


def test_too_little_memory_is_an_error_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: Tensor) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty_like", none_left)
    with pytest.raises(MemoryError, match=r"2 tensors needs 3.0 MiB of cpu, on top of 0.0 MiB.*can't allocate"):
        Snapshots(lambda: [torch.zeros(2**18), torch.zeros(2**18, dtype=torch.float64)]).begin()


def test_memory_that_is_only_promised_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "host_memory", lambda: HostMemory(2**20, "MemAvailable"))
    monkeypatch.setattr(module, "SLAB", 2**20)
    snapshot = Snapshots(lambda: [torch.zeros(2**18)])
    snapshot.begin()
    snapshot.release()
    with pytest.raises(MemoryError, match=r"needs 1.5 MiB of cpu.*: 1.0 MiB are free \(MemAvailable\)"):
        Snapshots(lambda: [torch.zeros(2**18), torch.zeros(2**17)]).begin()


def test_pinned_buffers_lie_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU nothing can be pinned: where the buffers lie is the same."""
    made: list[int] = []

    def slab(size: int) -> Tensor:
        made.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(module, "_slab", slab)
    monkeypatch.setattr(module, "SLAB", 512)
    tensors = [tensor for tensor in forms() if tensor.ndim]
    buffers = list(module._pinned_like(tensors))
    for tensor, buffer in zip(tensors, buffers, strict=True):
        assert (tensor.shape, tensor.dtype) == (buffer.shape, buffer.dtype)
        buffer.copy_(tensor)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(tensors, buffers, strict=True))
    assert len(made) < len(tensors)
    assert sum(made) < sum(tensor.nbytes for tensor in tensors) + 512 * len(made)


# --- all that a step changes

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]
FOREIGN: dict[str, Make] = {
    "torch AdamW": lambda params: torch.optim.AdamW(params, amsgrad=True),
    "torch SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "torch NAdam": lambda params: torch.optim.NAdam(params),
    "torch ASGD": lambda params: torch.optim.ASGD(params),
    "torch LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3, history_size=2),
}


def problem() -> tuple[nn.Sequential, Callable[[torch.optim.Optimizer], Any]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
    x = torch.randn(8, 5)

    def step(optimizer: torch.optim.Optimizer) -> Any:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss

        return optimizer.step(closure)  # type: ignore[arg-type]

    return net, step


def assert_identical(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_identical(found[key], expected[key])
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_identical(one, other)
    elif isinstance(found, Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(bits(found), bits(expected))
    else:
        assert found == expected


def run(make: Make, steps: int, undo_at: tuple[int, ...] = (), wasted: int = 1) -> Any:
    """A training; at some of its steps, others are made first, and undone."""
    net, step = problem()
    optimizer = make(net.parameters())
    snapshot = StepSnapshot(optimizer)
    for number in range(steps):
        if number in undo_at:
            snapshot.begin()
            snapshot.wait()
            lrs = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] *= 10
            for _ in range(wasted):
                step(optimizer)
            snapshot.restore()
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr
        step(optimizer)
    snapshot.release()
    return net.state_dict(), optimizer.state_dict()


def maker(name: str, **options: Any) -> Make:
    return FOREIGN.get(name) or (lambda params: optimizer_info(name).create(params, **options))


@pytest.mark.filterwarnings("ignore:.*the parameters have no names")
@pytest.mark.parametrize("undo_at", [(0,), (1,), (4,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("name", [*OPTIMIZERS, *FOREIGN])
def test_undone_steps_leave_no_trace(name: str, undo_at: tuple[int, ...]) -> None:
    """Before the first step there are no slots, before the second one plans differ, later ones are alike."""
    assert_identical(run(maker(name), 6, undo_at, wasted=2), run(maker(name), 6))


@pytest.mark.filterwarnings("ignore:.*the parameters have no names")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("engine", ["eager", "foreach"])
def test_on_every_engine(name: str, engine: str) -> None:
    make = maker(name, engine=engine)
    assert_identical(run(make, 4, (0, 2)), run(make, 4))


class Counting(torch.optim.SGD):
    """Has in its groups and state what some optimizers have there."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group |= {"k": 0, "sums": torch.zeros(2), "path": [torch.zeros(1)], "call": len}

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            group["k"] += 1
            group["sums"] += 1
            group["path"].append(torch.ones(1) * group["k"])
            group["new"] = True
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("last", deque(maxlen=3)).append(p.detach().clone())
                state["nested"] = {"a": ({"b": state["last"][-1] * 2}, group["k"])}
        return loss


class Wrapping(torch.optim.Optimizer):
    """With an optimizer inside that has state of its own."""

    def __init__(self, params: Any) -> None:
        self.inner = torch.optim.Adam(params, lr=0.1)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@pytest.mark.parametrize("undo_at", [(0,), (2,)])
def test_options_and_nested_state(undo_at: tuple[int, ...]) -> None:
    nets = []
    for at in (undo_at, ()):
        net, step = problem()
        optimizer = Counting(net.parameters())
        snapshot = StepSnapshot(optimizer)
        for number in range(4):
            if number in at:
                snapshot.begin()
                snapshot.wait()
                step(optimizer)
                snapshot.restore()
                assert ("new" in optimizer.param_groups[0]) == (number > 0)
            step(optimizer)
        state = [[*s["last"], s["nested"]["a"][0]["b"]] for s in optimizer.state.values()]
        (group,) = optimizer.param_groups
        nets.append([net.state_dict(), state, group["k"], group["sums"], group["path"]])
        assert [s["last"].maxlen for s in optimizer.state.values()] == [3] * 4
        snapshot.release()
    assert_identical(*nets)


def test_optimizers_within_optimizers() -> None:
    assert_identical(run(Wrapping, 4, (0, 2)), run(Wrapping, 4))
    optimizer = Wrapping(problem()[0].parameters())
    assert StepSnapshot(optimizer)._collected() == [p for g in optimizer.param_groups for p in g["params"]]


def test_learning_rates_and_added_groups_are_left_alone() -> None:
    net, step = problem()
    optimizer = torch.optim.AdamW(net[0].parameters(), lr=0.1, weight_decay=0.5)
    snapshot = StepSnapshot(optimizer)
    snapshot.begin()
    snapshot.wait()
    optimizer.add_param_group({"params": list(net[2].parameters()), "lr": 0.3})
    optimizer.param_groups[0] |= {"lr": 0.7, "weight_decay": 0.0}
    snapshot.restore()
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.3]
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    step(optimizer)
    snapshot.release()


def test_frozen_parameters_are_not_copied() -> None:
    weight, frozen = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(1000), requires_grad=False)
    optimizer = torch.optim.SGD([weight, frozen], lr=0.1)
    snapshot = StepSnapshot(optimizer)
    snapshot.begin()
    assert snapshot.snapshots.nbytes == 32
    snapshot.release()


def test_state_that_cannot_be_copied_is_refused() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight]["history"] = object()
    with pytest.raises(TypeError, match="SGD's state has a object, which a snapshot cannot copy; valid: tensors"):
        StepSnapshot(optimizer).begin()


def test_another_place_is_refused() -> None:
    with pytest.raises(ValueError, match="where='disk'; valid: device, host"):
        Snapshots(list, "disk")  # type: ignore[arg-type]
