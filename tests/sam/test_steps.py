"""Every step is that of the plain loop, whatever is inside."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim.optimizers.sam import SAM

from .common import BASES, closure_of, loss_of, network, perturbation, train, train_by_hand, weights

EACH = pytest.mark.parametrize("name", BASES)


@EACH
def test_a_plain_loop(name: str) -> None:
    ours, theirs = network(), network()
    train(ours, SAM(ours.parameters(), BASES[name], rho=0.3), range(6))
    train_by_hand(theirs, BASES[name](theirs.parameters()), 0.3, range(6))
    for found, expected in zip(weights(ours), weights(theirs), strict=True):
        # Ours steps float64 by the same engines; Muon's iterations enlarge what the perturbation rounds.
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_it_is_not_the_base() -> None:
    ours, plain = network(), network()
    train(ours, SAM(ours.parameters(), BASES["torch SGD"], rho=0.3), range(3))
    base = BASES["torch SGD"](plain.parameters())
    for step in range(3):
        closure_of(base, plain, step)()
        base.step()
    assert not torch.allclose(weights(ours)[0], weights(plain)[0], rtol=1e-3)


def test_no_perturbation_is_the_base() -> None:
    ours, plain = network(), network()
    train(ours, SAM(ours.parameters(), BASES["torch SGD"], rho=0.0), range(3))
    base = BASES["torch SGD"](plain.parameters())
    for step in range(3):
        closure_of(base, plain, step)()
        base.step()
    for found, expected in zip(weights(ours), weights(plain), strict=True):
        assert torch.equal(found, expected)


@EACH
def test_by_its_parts(name: str) -> None:
    """With two batches in a window, as whoever accumulates would write it."""
    ours, theirs = network(), network()
    optimizer = SAM(ours.parameters(), BASES[name], rho=0.3)
    parts = SAM(theirs.parameters(), BASES[name], rho=0.3)
    for step in range(3):
        for move in (parts.perturb, parts.restore):
            parts.zero_grad()
            for batch in (step, step + 50):
                (loss_of(theirs, batch) / 2).backward()
            move()
        parts.step()

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = (loss_of(ours, step) + loss_of(ours, step + 50)) / 2
            loss.backward()
            return loss

        optimizer.step(closure)
    for found, expected in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_perturbation(dtype: torch.dtype, adaptive: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    params: list[Tensor] = []
    grads: list[Tensor] = []
    for shape in ((4, 3), (5,), (2, 2, 3), (0, 4)):
        for made in (params, grads):
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            if dtype.is_complex:
                value = torch.complex(value, torch.randn(shape, generator=generator, dtype=torch.float64))
            made.append(value.to(dtype))
    leaves = [nn.Parameter(p.clone()) for p in params]
    optimizer = SAM(leaves, partial(torch.optim.SGD, lr=1.0), rho=0.5, adaptive=adaptive)
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad.clone()
    optimizer.perturb()
    exact = torch.complex128 if dtype.is_complex else torch.float64
    wide = [p.to(exact) for p in params]
    sizes = [p.abs() + 0.01 if adaptive and p.ndim > 1 else torch.ones(()) for p in wide]
    scaled = [t * g.to(exact) for t, g in zip(sizes, grads, strict=True)]
    norm = torch.stack([s.abs().square().sum() for s in scaled]).sum().sqrt()
    for leaf, p, t, s in zip(leaves, wide, sizes, scaled, strict=True):
        expected = (p + 0.5 * t * s / norm).to(dtype)
        # A bit of the weight, which the move is rounded to.
        torch.testing.assert_close(leaf.detach(), expected, rtol=4e-3 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    assert all(torch.equal(leaf.grad, g) for leaf, g in zip(leaves, grads, strict=True) if leaf.grad is not None)
    optimizer.restore()
    assert all(torch.equal(leaf.detach(), p) for leaf, p in zip(leaves, params, strict=True))


def test_what_asam_takes_for_a_bias() -> None:
    """By name where there are names, as its authors' code does, else by shape."""
    net = network()
    grads = [torch.ones_like(p) * (1 + i) for i, p in enumerate(net.parameters())]
    old = weights(net)
    for named in (True, False):
        optimizer = SAM(net.named_parameters() if named else net.parameters(), BASES["torch SGD"], 0.5, adaptive=True)
        for p, g in zip(net.parameters(), grads, strict=True):
            p.grad = g
        optimizer.perturb()
        has_size = [True, False, named, False, True, False]  # of which the third is the norm's scale
        sizes = [p.abs() + 0.01 if size else 1.0 for p, size in zip(old, has_size, strict=True)]
        moves = perturbation(old, grads, [0.5] * 6, sizes)
        for p, before, move in zip(net.parameters(), old, moves, strict=True):
            torch.testing.assert_close(p.detach(), before + move, rtol=1e-12, atol=1e-12)
        optimizer.restore()


def test_groups_of_their_own() -> None:
    """One norm for all; the length of the move, and whether it is ASAM's, by group."""
    net = network()
    first, rest = list(net[0].parameters()), list(net[1:].parameters())
    groups: list[dict[str, Any]] = [
        {"params": first, "sam_rho": 0.1, "lr": 0.5},
        {"params": rest, "sam_adaptive": True},
    ]
    optimizer = SAM(groups, BASES["ours"], rho=0.2)
    later = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    optimizer.add_param_group({"params": [later], "sam_rho": 0.0})
    assert [group["sam_rho"] for group in optimizer.param_groups] == [0.1, 0.2, 0.0]
    assert [group["sam_adaptive"] for group in optimizer.param_groups] == [False, True, False]
    assert [group["lr"] for group in optimizer.base.param_groups] == [0.5, 0.05, 0.05]
    params = [*first, *rest, later]
    old, grads = [p.detach().clone() for p in params], [torch.randn_like(p) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.perturb()
    adaptive = [p.abs() + 0.01 if i in (4,) else 1.0 for i, p in enumerate(old)]
    moves = perturbation(old, grads, [0.1] * 2 + [0.2] * 4 + [0.0], adaptive)
    for p, before, move in zip(params, old, moves, strict=True):
        torch.testing.assert_close(p.detach(), before + move, rtol=1e-12, atol=1e-12)


def test_muons_two_kinds_of_groups_keep_what_was_asked_for() -> None:
    net = network()
    groups: list[dict[str, Any]] = [
        {"params": list(net[0].parameters()), "sam_rho": 0.1},
        {"params": list(net[1:].parameters())},
    ]
    optimizer = SAM(groups, BASES["muon"], rho=0.2)
    kinds = [(group["use_muon"], group["sam_rho"]) for group in optimizer.param_groups]
    assert kinds == [(True, 0.1), (False, 0.1), (True, 0.2), (False, 0.2)]


@pytest.mark.parametrize("scale", [65536.0, torch.tensor(65536.0)])
def test_a_loss_scale(scale: float | Tensor) -> None:
    """The norm does not overflow, and what is added to it is not scaled."""
    p = nn.Parameter(torch.zeros(2))
    optimizer = SAM([p], partial(torch.optim.SGD, lr=1.0), rho=0.5)
    p.grad = torch.tensor([3e30, 4e30]) * 65536
    optimizer.perturb(scale)
    torch.testing.assert_close(p.detach(), torch.tensor([0.3, 0.4]))
    optimizer.restore()
    p.grad = torch.tensor([3e-13, 4e-13]) * 65536
    optimizer.perturb(scale)
    torch.testing.assert_close(p.detach(), torch.tensor([0.1, 0.4 / 3]))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_move_nothing(bad: float) -> None:
    """Neither the weights whose own gradients are finite."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = SAM([p, q], partial(torch.optim.SGD, lr=1.0), rho=0.5)
    p.grad, q.grad = torch.tensor([1.0, bad, 2.0]), torch.ones(2)
    optimizer.perturb()
    assert torch.equal(p.detach(), torch.ones(3))
    assert torch.equal(q.detach(), torch.ones(2))
    optimizer.restore()
    optimizer.step()
    assert not p.isfinite().all()  # as in a plain step
    assert q.tolist() == [0.0, 0.0]


def test_gradients_that_are_zero_or_missing() -> None:
    p, q, r = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = SAM([p, q, r], partial(torch.optim.SGD, lr=1.0), rho=0.5)
    p.grad, q.grad = torch.zeros(2), torch.zeros(2)
    optimizer.perturb()
    optimizer.restore()
    optimizer.step()
    assert p.tolist() == q.tolist() == r.tolist() == [1.0, 1.0]
    optimizer.zero_grad()
    optimizer.perturb()
    optimizer.restore()
    optimizer.step()
    assert r.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "slice"])
def test_memory_layouts(layout: str) -> None:
    made = {
        "channels_last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "transposed": lambda: torch.randn(3, 4).t(),
        "slice": lambda: torch.randn(4, 6)[:, ::2],
    }[layout]()
    p = nn.Parameter(made)
    p.grad = torch.randn(p.shape)
    old, grad = p.detach().clone(), p.grad.clone()
    optimizer = SAM([p], partial(torch.optim.SGD, lr=0.0), rho=0.5)
    optimizer.perturb()
    torch.testing.assert_close(p.detach(), old + 0.5 * grad / grad.norm())
    optimizer.restore()
    assert torch.equal(p.detach(), old)


def test_a_failed_second_evaluation_puts_the_weights_back() -> None:
    net = network()
    optimizer = SAM(net.parameters(), BASES["torch SGD"])
    old, calls = weights(net), iter([None, ZeroDivisionError()])

    def closure() -> Tensor:
        if (error := next(calls)) is not None:
            raise error
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert all(torch.equal(p, before) for p, before in zip(weights(net), old, strict=True))


def test_a_move_that_fails_half_way_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    optimizer = SAM(net.parameters(), BASES["torch SGD"])
    loss_of(net, 0).backward()
    old, stock, calls = weights(net), Tensor.clone, iter(range(3))

    def scarce(tensor: Tensor) -> Tensor:
        if next(calls) == 2:
            raise torch.OutOfMemoryError
        return stock(tensor)

    monkeypatch.setattr(Tensor, "clone", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.perturb()
    monkeypatch.undo()
    assert all(torch.equal(p, before) for p, before in zip(weights(net), old, strict=True))
    optimizer.perturb()  # nothing is left of it
    optimizer.restore()
