"""Accumulation: each window's gradient is the (weighted) mean over its batches, in a loop without a trainer."""

from __future__ import annotations

import io
import itertools
from collections import UserDict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optim.checks import WrongTypeError
from lightning_optim.control.accumulation import Accumulator, scale_gradients
from lightning_optim.offload import Detached
from lightning_optim.offload.away import Away


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def batches(*lengths: int) -> list[Tensor]:
    """Batches of so many tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 3, generator=generator) for length in lengths]


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    return (net(batch) - batch.sin().sum(dim=1, keepdim=True)).square().mean()


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def accumulated(accumulator: Accumulator, epochs: list[Any], scale: float = 1.0) -> list[list[Tensor]]:
    """The gradients of each step."""
    net, steps = model(), []
    for number, epoch in enumerate(epochs, start=1):
        for batch in accumulator.batches(epoch, last_epoch=number == len(epochs)):
            (scale * accumulator.share(loss_of(net, batch), batch, net.parameters())).backward()
            if accumulator.steps:
                steps.append(gradients(net))
                net.zero_grad()
    assert not gradients(net)
    return steps


def of_windows(windows: list[list[Tensor]], weighted: bool) -> list[list[Tensor]]:
    """The same, each window as one big batch (if weighted), or its batches' losses averaged."""
    net, steps = model(), []
    for window in windows:
        if weighted:
            loss_of(net, torch.cat(window)).backward()
        else:
            (sum((loss_of(net, batch) for batch in window), torch.zeros(())) / len(window)).backward()
        steps.append(gradients(net))
        net.zero_grad()
    return steps


def assert_close(found: list[list[Tensor]], expected: list[list[Tensor]], tolerance: float = 1e-6) -> None:
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


class Unsized:
    """A loader whose length is not known."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


#: Options, the number of batches in each epoch, and how many batches each step has.
SCHEDULES: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    "every batch": ({"windows": 1}, [3], [1, 1, 1]),
    "whole windows": ({"windows": 2}, [4], [2, 2]),
    "a short last window": ({"windows": 3}, [7, 4], [3, 3, 1, 3, 1]),
    "an epoch shorter than a window": ({"windows": 8}, [3, 3], [3, 3]),
    "by epoch": ({"windows": {0: 2, 1: 3, 3: 1}}, [4, 4, 4, 2], [2, 2, 3, 1, 3, 1, 1, 1]),
    "by epoch, from the second": ({"windows": {1: 3}}, [2, 4], [1, 1, 3, 1]),
    "by step": ({"windows": {0: 1, 1: 2, 3: 3}, "by": "step"}, [6, 6], [1, 2, 2, 1, 3, 3]),
    "across": ({"windows": 3, "across_epochs": True}, [4, 4, 3], [3, 3, 3, 2]),
    "across short epochs": ({"windows": 4, "across_epochs": True}, [1, 1, 1, 1, 1, 1], [4, 2]),
    "across, by step": ({"windows": {0: 2, 1: 5}, "by": "step", "across_epochs": True}, [4, 4, 4], [2, 5, 5]),
    "across, by epoch": ({"windows": {0: 3, 1: 2}, "across_epochs": True}, [4, 5], [3, 3, 2, 1]),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("loader", [list, Unsized], ids=["sized", "unsized"])
@pytest.mark.parametrize("case", SCHEDULES)
def test_each_step_is_the_mean_of_its_window(case: str, loader: Callable[..., Any], weighted: bool) -> None:
    options, lengths, windows = SCHEDULES[case]
    ragged = batches(*(1 + 5 * (i % 4) for i in range(sum(lengths))))
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    epochs = [loader(ragged[a:b]) for a, b in itertools.pairwise(bounds)]
    accumulator = Accumulator(**options, weigh=len if weighted else None)
    found = accumulated(accumulator, epochs)
    ends = [sum(windows[:i]) for i in range(len(windows) + 1)]
    expected = of_windows([ragged[a:b] for a, b in itertools.pairwise(ends)], weighted)
    assert_close(found, expected)
    assert (accumulator.step, accumulator.epoch, accumulator.rest) == (len(windows), len(lengths), 0)


def test_the_usual_division_is_wrong_in_both_cases() -> None:
    """What this is for: without it, the same windows have other gradients."""
    window = batches(1, 9, 2)
    net = model()
    for batch in window[:2]:  # the last window of an epoch, whose third batch does not exist
        (loss_of(net, batch) / 3).backward()
    usual = [gradients(net)]
    for expected in (of_windows([window[:2]], weighted=False), of_windows([window[:2]], weighted=True)):
        with pytest.raises(AssertionError, match="not close"):
            assert_close(usual, expected, 1e-2)
    assert_close([[1.5 * g for g in usual[0]]], of_windows([window[:2]], weighted=False))


def test_windows_of_equal_batches_are_exactly_the_usual_loop() -> None:
    window = batches(4, 4, 4)
    net = model()
    for batch in window:
        (loss_of(net, batch) / 3).backward()
    assert_close(accumulated(Accumulator(3), [window]), [gradients(net)], 0.0)


# ---------------------------------------------------------------- weights


def test_a_weight_may_be_a_number_or_a_tensor_a_key_or_an_attribute() -> None:
    window = batches(2, 7)
    expected = of_windows([window], weighted=True)[0]
    for wrap, weigh in (
        (lambda x: {"x": x, "tokens": len(x)}, "tokens"),
        (lambda x: UserDict(x=x, tokens=torch.tensor([len(x)])), "tokens"),
        (lambda x: SimpleNamespace(x=x, tokens=torch.tensor(len(x))), "tokens"),
        (lambda x: {"x": x}, lambda batch: torch.ones(len(batch["x"]), dtype=torch.bool).sum()),
    ):
        net, accumulator = model(), Accumulator(2, weigh=weigh)
        for x in accumulator.batches(window):
            accumulator.share(loss_of(net, x), wrap(x), net.parameters()).backward()
        assert_close([gradients(net)], [expected])


def test_batches_without_weight_count_for_nothing() -> None:
    window = batches(3, 4, 5)
    weights = iter([0, 4, 0])
    found = accumulated(Accumulator(3, weigh=lambda batch: next(weights)), [window])
    assert_close(found, of_windows([window[1:2]], weighted=True))


def test_a_window_without_weight_has_zero_gradients() -> None:
    first, second = accumulated(Accumulator(2, weigh=lambda batch: torch.tensor(0)), [batches(1, 2, 3)])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in (*first, *second))


def test_the_loss_keeps_its_value() -> None:
    net, accumulator, window = model(), Accumulator(2, weigh=len), batches(2, 7)
    for batch in accumulator.batches(window):
        loss = loss_of(net, batch)
        assert accumulator.share(loss, batch, net.parameters()).item() == loss.item() / 2


def test_factors_stay_near_one() -> None:
    """With thousands of tokens in each batch, scaled gradients of float16 would overflow if multiplied by them."""
    net, seen = model(), []
    accumulator = Accumulator(3, weigh=lambda batch: 4096 * len(batch))
    for batch in accumulator.batches(batches(*[5, 6, 4] * 4)):
        loss = loss_of(net, batch)
        accumulator.contribute(loss, batch, net.parameters())
        loss.register_hook(lambda gradient: seen.append(gradient.item()))
        loss.backward()
    assert len(seen) == 12
    assert all(0.5 <= factor <= 2 for factor in seen)


def test_a_gradient_of_a_batch_that_comes_again() -> None:
    """As for SAM's second pass: gradients are dropped, and the whole window is evaluated once more."""
    net, accumulator, window = model(), Accumulator(3, weigh=len), batches(1, 9, 2)
    for batch in accumulator.batches(window):
        accumulator.share(loss_of(net, batch), batch, net.parameters()).backward()
    first = gradients(net)
    net.zero_grad()
    for batch in window:
        loss = loss_of(net, batch)
        accumulator.again(loss, batch)
        (loss / accumulator.length).backward()
    assert_close([gradients(net)], [first])


def test_a_batch_without_a_loss_does_not_count() -> None:
    window = batches(3, 8, 5)
    for weigh in (None, len):
        for missing in range(3):
            net, accumulator = model(), Accumulator(3, weigh=weigh)
            for number, batch in enumerate(accumulator.batches(window)):
                if number == missing:
                    accumulator.contribute(None, batch, net.parameters())
                else:
                    accumulator.share(loss_of(net, batch), batch, net.parameters()).backward()
            left = window[:missing] + window[missing + 1 :]
            assert_close([gradients(net)], of_windows([left], weighted=weigh is not None))


class _NoReading(TorchDispatchMode):
    """Raises where a tensor is read by the host, for which a device would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise AssertionError("a tensor was read")
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU, where this costs nothing, the value of a weight is checked.
    monkeypatch.setattr("lightning_optim.control.accumulation.check_number", lambda who, name, value, *_, **__: value)
    net, accumulator = model(), Accumulator(2, weigh=lambda batch: torch.tensor(len(batch)))
    with _NoReading():
        for batch in accumulator.batches(batches(2, 7, 4)):
            accumulator.share(loss_of(net, batch), batch, net.parameters()).backward()
        with pytest.raises(AssertionError, match="was read"):
            torch.ones(()).item()


@pytest.mark.gpu
def test_a_device_is_not_waited_for() -> None:
    net, window = model().cuda(), [batch.cuda() for batch in batches(2, 7, 4)]
    accumulator = Accumulator(3, weigh=lambda batch: (batch[:, 0] < 10).sum())
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in accumulator.batches(window):
            accumulator.share(loss_of(net, batch), batch, net.parameters()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [[g.cpu() for g in gradients(net)]]
    assert_close(found, of_windows([batches(2, 7, 4)], weighted=True), 1e-5)


# ---------------------------------------------------------------- gradients


def test_gradients_of_every_kind_are_multiplied() -> None:
    factor = torch.tensor(1 + 2**-12, dtype=torch.float64)
    sparse = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([2.0]), (3,), check_invariants=True)
    for grad in (torch.full((3,), 2.0), torch.full((3,), 2.0 + 1j), torch.full((3,), 2.0).double(), sparse):
        p = nn.Parameter(torch.zeros(3, dtype=grad.dtype))
        p.grad = grad.clone()
        scale_gradients([p, p, nn.Parameter(torch.zeros(1))], factor)
        assert torch.equal(p.grad.to_dense(), (grad * (1 + 2**-12)).to_dense())


def test_a_factor_is_not_rounded_to_the_type_of_short_gradients() -> None:
    """Of 1.0035 bfloat16 would make 1."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    for factor in (torch.tensor(1.0035, dtype=torch.float64), 1.0035):
        p.grad = torch.tensor([1.9921875], dtype=torch.bfloat16)
        scale_gradients([p], factor)
        assert p.grad.item() == torch.tensor(1.9921875 * 1.0035).bfloat16().item() != 1.9921875


@pytest.mark.parametrize("seen", [False, True])
def test_gradients_that_have_left_for_the_host_are_multiplied_there(seen: bool) -> None:
    net, window, accumulator = model(), batches(1, 9, 2), Accumulator(3, weigh=len)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    detached = Detached(optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    for batch in accumulator.batches(window):
        detached.last = accumulator.steps
        loss = accumulator.share(loss_of(net, batch), batch, net.parameters())
        if accumulator.position != 1:  # after the first batch, or the second
            assert all((p.grad.kept._value is None) != seen for p in net.parameters() if isinstance(p.grad, Away))
        loss.backward()
        assert all(isinstance(p.grad, Away) != accumulator.steps for p in net.parameters())
        if seen and not accumulator.steps:
            assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    detached.step()
    detached.close()
    steps = [old - p.detach() for old, p in zip(before, net.parameters(), strict=True)]
    assert_close([steps], of_windows([window], weighted=True))


# ---------------------------------------------------------------- resuming


def resumed(accumulator: Accumulator, **options: Any) -> Accumulator:
    buffer = io.BytesIO()
    torch.save(accumulator.state_dict(), buffer)
    buffer.seek(0)
    again = Accumulator(**options)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    return again


def test_a_run_that_is_resumed_between_windows_goes_on_as_it_was() -> None:
    options: dict[str, Any] = {"windows": {0: 1, 2: 3}, "by": "step", "weigh": len}
    data = [batches(*[3, 1, 4, 1, 5]), batches(*[9, 2, 6, 5])]
    expected = accumulated(Accumulator(**options), data)
    first = Accumulator(**options)
    begun = accumulated(first, data[:1])
    second = resumed(first, **options)
    assert_close(begun + accumulated(second, data[1:]), expected, 0.0)


def test_a_window_that_was_open_is_stepped_with_what_is_left_of_it() -> None:
    window, net = batches(3, 8, 5, 2), model()
    accumulator = Accumulator(4, weigh=len)
    for batch in accumulator.batches(window):
        accumulator.share(loss_of(net, batch), batch, net.parameters()).backward()
        if accumulator.position == 1:
            break
    assert accumulator.state_dict() | {"reference": None} == {
        "epoch": 0,
        "step": 0,
        "position": 1,
        "length": 4,
        "reference": None,
    }
    again = resumed(accumulator, windows=4, weigh=len)
    assert (again.resumed_at, again.rest) == (1, 3)
    assert again.state_dict() == accumulator.state_dict()
    assert_close(accumulated(again, [window[1:] + batches(6)]), of_windows([window[1:], batches(6)], weighted=True))


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 0}, r"Accumulator: windows=0; valid: a whole number >= 1"),
        ({"windows": 2.0}, r"windows=2.0 is a float; valid: a whole number >= 1"),
        ({"windows": {}}, r"windows=\{\}; valid: .* a dict such as \{0: 4, 10: 2\}"),
        ({"windows": {0: 0}}, r"windows\[0\]=0; valid: a whole number >= 1"),
        ({"windows": {-1: 2}}, r"epoch in windows=-1; valid: a whole number >= 0"),
        ({"windows": {"0": 2}, "by": "step"}, r"step in windows='0' is a str; valid: a whole number >= 0"),
        ({"by": "batch"}, r"by='batch'; valid: epoch, step"),
        ({"across_epochs": 1}, r"across_epochs=1 is not a bool"),
        ({"weigh": 3}, r"weigh=3; valid: None, a function of a batch, or the name"),
        ({"weigh": ""}, r"weigh=''; valid: None"),
    ],
    ids=str,
)
def test_options_that_are_not_valid(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Accumulator(**options)


@pytest.mark.parametrize(
    ("weigh", "message"),
    [
        (lambda batch: -1, r"the weight of a batch=-1; valid: a finite number >= 0"),
        (lambda batch: torch.tensor(float("nan")), r"the weight of a batch=nan; valid"),
        (lambda batch: None, r"the weight of a batch=None is a NoneType; valid"),
        (lambda batch: batch > 0, r"the weight of a batch has shape \(2, 3\); valid"),
        ("tokens", r"weigh='tokens', and a batch is a Tensor without such an attribute; valid"),
    ],
)
def test_weights_that_are_not_valid(weigh: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accumulated(Accumulator(2, weigh=weigh), [batches(2, 2)])


def test_a_missing_key_is_told_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"weigh='tokens', and a batch has the keys 'x', 'y'; valid: one of those"):
        Accumulator(1, weigh="tokens").contribute(torch.ones(()), {"x": 1, "y": 2}, [])
    assert issubclass(WrongTypeError, ValueError)
