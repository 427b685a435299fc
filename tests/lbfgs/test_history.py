"""The compact history against the two-loop recursion."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from lightning_optim.optimizers.lbfgs.byrd_nocedal import BLOCK, CompactHistory, blocks_of, cosine, dot

from .common import two_loop

F32, F64 = torch.float32, torch.float64


def pairs_of(history: CompactHistory, number: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Steps and the changes of the gradient of a quadratic along them, a little bent."""
    generator = torch.Generator().manual_seed(seed)
    n = history.elements
    hessian = torch.logspace(0, 2, n, dtype=F64)
    made = []
    for _ in range(number):
        s = torch.randn(n, generator=generator, dtype=F64)
        bent = 1 + 0.3 * torch.rand(n, generator=generator, dtype=F64)
        made.append((s.to(history.dtype), (hessian * s * bent).to(history.dtype)))
    return made


def direction(history: CompactHistory, gradient: Tensor) -> Tensor:
    out = history.vector()
    history.direction(history.vector(gradient), 1.0, out=out)
    assert not out[history.elements :].any(), "what fills up the last block stays zero"
    return out[: history.elements]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("n", [1, 7, 100, 2 * BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize(("size", "number"), [(1, 3), (5, 3), (5, 5), (5, 13), (30, 61)])
def test_two_loop(n: int, size: int, number: int) -> None:
    """At every step, the ring going around up to twice, and with steps at which no direction is asked for."""
    history = CompactHistory(n, size, F64)
    pairs = pairs_of(history, number)
    for index, (s, y) in enumerate(pairs):
        history.add(history.vector(s), history.vector(y))
        if index % 4 == 1:
            continue
        gradient = torch.randn(n, generator=torch.Generator().manual_seed(index), dtype=F64)
        expected = two_loop(gradient, pairs[max(0, index + 1 - size) : index + 1])
        assert error(direction(history, gradient), expected) < 1e-10
        assert len(history) == min(size, index + 1)


def test_float32_is_as_good_as_its_numbers() -> None:
    """The error is that of pairs rounded to float32: dot products in float64 would not make it smaller."""
    history = CompactHistory(3 * BLOCK, 20, F32)
    pairs = pairs_of(history, 25)
    for s, y in pairs:
        history.add(history.vector(s), history.vector(y))
    gradient = torch.randn(history.elements, generator=torch.Generator().manual_seed(1))
    assert error(direction(history, gradient), two_loop(gradient, pairs[5:])) < 2e-6


@pytest.mark.parametrize("together", [False, True])
def test_a_reload_changes_nothing(together: bool) -> None:
    """``together``: at a moment when the newest pair's products are not computed yet."""
    straight = CompactHistory(50, 4, F64)
    pairs = pairs_of(straight, 9)
    resumed = CompactHistory(50, 4, F64)
    for index, (s, y) in enumerate(pairs):
        for history in (straight, resumed):
            history.add(history.vector(s), history.vector(y))
        gradient = torch.randn(50, generator=torch.Generator().manual_seed(index), dtype=F64)
        if not together:
            assert torch.equal(direction(straight, gradient), direction(resumed, gradient))
        state = copy.deepcopy(resumed.state_dict())
        assert state["pending"] == together
        resumed = CompactHistory(50, 4, F64)
        resumed.load_state_dict(state)
        assert torch.equal(direction(straight, gradient), direction(resumed, gradient))


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_into_another_size_or_type(size: int, dtype: torch.dtype) -> None:
    """The newest pairs that fit."""
    source = CompactHistory(50, 5, F64)
    pairs = pairs_of(source, 7)
    for s, y in pairs:
        source.add(source.vector(s), source.vector(y))
    target = CompactHistory(50, size, dtype)
    target.load_state_dict(source.state_dict())
    gradient = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=F64)
    expected = two_loop(gradient, pairs[2:][-size:])
    assert error(direction(target, gradient), expected) < (1e-10 if dtype == F64 else 1e-5)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    history = CompactHistory(50, 5, F64)
    for s, y in pairs_of(history, 6):
        history.add(history.vector(s), history.vector(y))
    gradient = torch.ones(50, dtype=F64)
    before = direction(history, gradient)
    good = copy.deepcopy(history.state_dict())
    for broken, message in [
        ({key: value for key, value in good.items() if key != "gamma"}, "lacks gamma"),
        (good | {"history": good["history"][:, :, :4]}, r"shape \(1, 10, 4\)"),
        (good | {"order": [0, 0, 1]}, "damaged"),
        (good | {"sy": good["sy"][:2]}, "damaged"),
        (good | {"yy": None}, "damaged"),
    ]:
        with pytest.raises(ValueError, match=message):
            history.load_state_dict(broken)
        assert torch.equal(direction(history, gradient), before)


def test_without_pairs_it_is_the_gradient() -> None:
    history = CompactHistory(3, 5, F64)
    out = history.vector()
    history.direction(history.vector([1.0, 2.0, 3.0]), 0.5, out=out)
    assert out[:3].tolist() == [-0.5, -1.0, -1.5]
    history.add(history.vector([1.0, 0, 0]), history.vector([2.0, 0, 0]))
    history.clear()
    history.direction(history.vector([1.0, 2.0, 3.0]), 0.5, out=out)
    assert out[:3].tolist() == [-0.5, -1.0, -1.5]


def test_dot_products_are_summed_in_float64() -> None:
    """Products of one sign, where adding up in float32 alone loses most."""
    n = 40 * BLOCK
    a, b = (torch.rand(n, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    exact = float(a.double() @ b.double())
    assert abs(dot(a, b) / exact - 1) < 5e-8  # half a unit in the last place of float32 is 6e-8
    history = CompactHistory(n, 1, F32)
    history.add(a, b)
    history.direction(a, 1.0, out=history.vector())
    for found, expected in ((history.sy, exact), (history.yy, float(b.double() @ b.double()))):
        assert abs(float(found[0, 0]) / expected - 1) < 2e-8


def test_blocks_and_angles() -> None:
    for n in (1, 15, 16, 4096, 4097, 100_000, 2_000_000):
        blocks, block = blocks_of(n)
        assert blocks * block >= n
        assert block <= BLOCK
        assert block % 16 == 0
        assert blocks * block - n < blocks * 16, "little is filled up"
        assert dot(torch.ones(blocks * block), torch.ones(blocks * block)) == blocks * block
    x = torch.zeros(16)
    x[0] = 2.0
    assert cosine(x, -x) == -1
    assert not cosine(x, torch.zeros(16)) > 0
