"""What optimizers ask for, and a plain loop's answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim.stepping.evaluations import ClosureEvaluator, LossEvaluator, asks, request_of

from .common import CLOSE, Curious, by_matrix, directions

base = partial(lightning_optim.AdamW, lr=0.05, weight_decay=0.1)


class Searching(torch.optim.SGD):
    needs_closure = True


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("make", "request_"),
    [
        (partial(lightning_optim.SAM, base=torch.optim.SGD), "gradient"),
        (lightning_optim.LBFGS, "loss_and_gradient"),
        (torch.optim.LBFGS, "loss_and_gradient"),
        (Searching, "loss_and_gradient"),
        (Curious, "hessian_vector"),
        (lightning_optim.AdamW, None),
        (torch.optim.SGD, None),
    ],
)
def test_what_optimizers_ask_for(make: Callable[..., Any], request_: str | None) -> None:
    optimizer = make(params())
    assert request_of(optimizer) == request_
    assert asks(optimizer) == (request_ is not None)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def loss_of(net: nn.Module, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return net(torch.randn(6, 4, dtype=torch.float64, generator=generator)).square().mean()


def test_products() -> None:
    """Of the Hessian that is written out, weights and biases, without a trace in gradients or hooks."""
    net = network()
    weights = list(net.parameters())
    names = [name for name, _ in net.named_parameters()]
    called: list[str] = []
    for p in weights:
        p.register_post_accumulate_grad_hook(lambda p: called.append("hook"))
    u = directions(weights, 3)
    found = LossEvaluator(Curious(weights), lambda: loss_of(net)).hessian_vector(u)

    def of_values(*values: Tensor) -> Tensor:
        x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), x).square().mean()

    for p, expected in zip(weights, by_matrix(of_values, weights, u), strict=True):
        torch.testing.assert_close(found[p], expected, **CLOSE)
        assert p.grad is None
    assert called == []


def test_complex_parameters() -> None:
    """Real and imaginary parts are two variables."""
    z = nn.Parameter(torch.tensor([1 + 2j, -1 + 0.5j], dtype=torch.complex128))
    u = directions([z], 0)
    found = LossEvaluator(Curious([z]), lambda: (z.real**3 * z.imag).sum()).hessian_vector(u)[z]
    a, b, c, d = z.real, z.imag, u[z].real, u[z].imag
    expected = torch.complex(6 * a * b * c + 3 * a**2 * d, 3 * a**2 * c)
    torch.testing.assert_close(found, expected.detach(), **CLOSE)


def test_weights_on_which_nothing_depends_twice() -> None:
    """A gradient that is constant, or none, has the derivative zero."""
    linear, unused, curved = (nn.Parameter(torch.ones(2)) for _ in range(3))
    u = directions([linear, unused, curved], 0)
    for loss, expected in (
        (lambda: linear.sum(), 0.0),
        (lambda: linear.sum() + curved.square().sum(), 2.0),
    ):
        found = LossEvaluator(Curious([linear]), loss).hessian_vector(u)
        for p in (linear, unused):
            assert torch.equal(found[p], torch.zeros(2))
        torch.testing.assert_close(found[curved], expected * u[curved])


def test_directions_are_a_matter_of_two_numbers() -> None:
    """Not of a generator that others use, and in the order of the weight in memory."""
    net: Any = nn.Conv2d(3, 5, 3)
    net.to(memory_format=torch.channels_last)
    state = torch.get_rng_state()
    first, again = (directions(list(net.parameters()), 7) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    other = directions(list(net.parameters()), 8)
    for p in net.parameters():
        assert torch.equal(first[p], again[p])
        assert first[p].stride() == p.stride()
        assert not torch.equal(first[p], other[p])
    large = nn.Parameter(torch.zeros(100_000))
    u = directions([net.bias, large], 0)[large]
    assert abs(u.mean()) < 0.02
    assert abs(u.square().mean() - 1) < 0.02


@pytest.mark.parametrize(
    ("evaluate", "error", "message"),
    [
        (lambda w: None, TypeError, r"evaluate returned None; valid: the loss itself"),
        (lambda w: w.square(), TypeError, r"evaluate returned a tensor of shape \(2,\); valid: the loss"),
        (lambda w: w.square().sum().detach(), TypeError, r"evaluate returned a loss without a graph; valid"),
        (lambda w: _after_backward(w), RuntimeError, r"could not be differentiated twice .*backward\(\) was not"),
        (lambda w: torch.compile(_cube, backend="aot_eager")(w), RuntimeError, r"differentiated twice.*torch\.compile"),
    ],
)
def test_losses_that_cannot_be_differentiated_twice(evaluate: Any, error: type[Exception], message: str) -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=message):
        LossEvaluator(Curious([weight]), lambda: evaluate(weight)).hessian_vector(directions([weight], 0))
    torch._dynamo.reset()


def _after_backward(weight: Tensor) -> Tensor:
    loss = (weight**3).sum()
    loss.backward()
    return loss


def _cube(weight: Tensor) -> Tensor:
    return (weight**3).sum()


def test_a_closure_has_no_second_derivative() -> None:
    optimizer = Curious(params())
    with pytest.raises(RuntimeError, match=r"Curious: step\(closure\), where a second derivative is needed.*evaluate="):
        ClosureEvaluator(optimizer, lambda: None).hessian_vector({})


# ---------------------------------------------------------------- plain loops of SAM and L-BFGS


@pytest.mark.parametrize("name", ["SAM", "LBFGS"])
def test_steps_with_a_function_that_returns_the_loss(name: str) -> None:
    """The same bits as with a closure."""
    make: Any = {"SAM": partial(lightning_optim.SAM, base=base, rho=0.5), "LBFGS": lightning_optim.LBFGS}[name]
    nets = [network() for _ in range(3)]
    optimizers = [make(net.parameters()) for net in nets]
    for step in range(4):
        for net, optimizer, kind in zip(nets, optimizers, ("closure", "evaluate", "both"), strict=True):

            def closure(net: nn.Module = net, optimizer: Any = optimizer, step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(net, step)
                loss.backward()
                return loss

            evaluate = partial(loss_of, net, step)
            if kind == "closure":
                optimizer.step(closure)
            elif kind == "both":
                optimizer.step(closure, evaluate=evaluate)
            else:
                closure()
                optimizer.step(evaluate=evaluate)
    for one, *others in zip(*(net.parameters() for net in nets), strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_sam_evaluates_no_more_than_it_has_to() -> None:
    net, evaluated = network(), 0
    optimizer = lightning_optim.SAM(net.parameters(), base)

    def evaluate() -> Tensor:
        nonlocal evaluated
        evaluated += 1
        return loss_of(net)

    optimizer.step(evaluate=evaluate)  # without gradients there is nothing to step with
    assert evaluated == 0
    loss_of(net).backward()
    assert optimizer.step(evaluate=evaluate) is None
    assert evaluated == 1
    assert optimizer.asks
