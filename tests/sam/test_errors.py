"""Wrong options at construction, and steps that would silently be something else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim.optimizers.sam import SAM

from .common import BASES, loss_of, network

SGD = partial(torch.optim.SGD, lr=0.1)


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2))]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SAM(params(), SGD, rho=-0.1), ValueError, r"SAM: rho=-0.1; valid: a finite number >= 0"),
        (lambda: SAM(params(), SGD, rho=float("nan")), ValueError, r"SAM: rho=nan; valid"),
        (lambda: SAM(params(), SGD, rho="0.1"), TypeError, r"SAM: rho='0.1' is a str; valid"),  # type: ignore[arg-type]
        (lambda: SAM(params(), SGD, rho=True), TypeError, r"SAM: rho=True is a bool; valid"),
        (lambda: SAM(params(), SGD, adaptive=1), TypeError, r"SAM: adaptive=1 is not a bool"),  # type: ignore[arg-type]
        (lambda: SAM(params(), SGD(params())), TypeError, r"SAM: base=a SGD; valid: what builds"),  # type: ignore[arg-type]
        (lambda: SAM(params(), "SGD"), TypeError, r"SAM: base='SGD'; valid: what builds"),  # type: ignore[arg-type]
        (lambda: SAM(params(), lambda p: p), TypeError, r"SAM: base built a list; valid: a torch.optim.Optimizer"),  # type: ignore[arg-type, return-value]
        (lambda: SAM(params(), partial(SAM, base=SGD)), ValueError, r"SAM: base=SAM: a SAM in a SAM"),
        (lambda: SAM(params(), torch.optim.LBFGS), ValueError, r"SAM: base=LBFGS: it evaluates the model itself"),
        (lambda: SAM(params(), lightning_optim.LBFGS), ValueError, r"base=LBFGS: it evaluates the model itself"),
        (
            lambda: SAM([{"params": params(), "sam_rho": -1}], SGD),
            ValueError,
            r"SAM: sam_rho=-1; valid: a finite number >= 0",
        ),
        (
            lambda: SAM(params(), SGD).add_param_group({"params": params(), "sam_adaptive": None}),
            TypeError,
            r"SAM: sam_adaptive=None is not a bool",
        ),
        (
            lambda: SAM([{"params": params(), "sam_rh": 1}], lightning_optim.SGD),
            ValueError,
            r"SGD: sam_rh=1 in a param group is not an option",
        ),
        (lambda: SAM(torch.ones(2), SGD), TypeError, "params argument given to the optimizer should be"),
        (lambda: SAM([], SGD), ValueError, "empty parameter list"),
        (lambda: SAM(params(), SGD, roh=0.1), TypeError, "roh"),  # type: ignore[call-arg]
    ],
)
def test_construction(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_steps_out_of_order() -> None:
    net = network()
    optimizer = SAM(net.parameters(), BASES["ours"])
    loss_of(net, 0).backward()
    with pytest.raises(RuntimeError, match=r"step\(\) without a closure, and without perturb\(\) and restore\(\)"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"restore\(\) without perturb\(\)"):
        optimizer.restore()
    optimizer.perturb()
    with pytest.raises(RuntimeError, match=r"perturb\(\) twice; call restore\(\) in between"):
        optimizer.perturb()
    for closure in (None, lambda: 0.0):
        with pytest.raises(RuntimeError, match=r"step\(\) while the weights are perturbed; call restore\(\) first"):
            optimizer.step(closure)
    optimizer.restore()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"without perturb\(\) and restore\(\)"):
        optimizer.step()  # the next one needs gradients of its own


def test_a_closure_that_computes_no_gradients_the_second_time() -> None:
    """As one that only returns the loss, of whoever calls backward before the step."""
    net = network()
    optimizer = SAM(net.parameters(), BASES["ours"])
    old = [p.detach().clone() for p in net.parameters()]
    loss = loss_of(net, 0)
    loss.backward()
    with pytest.raises(RuntimeError, match="computed no gradients when it was called a second time; valid"):
        optimizer.step(lambda: loss)
    assert all(torch.equal(p, before) for p, before in zip(net.parameters(), old, strict=True))


def test_sparse_gradients() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = SAM(embedding.parameters(), SGD)

    def closure() -> Tensor:
        loss = embedding(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"parameter 0 of a group, of shape \(4, 3\), is sparse .*; valid: dense"):
        optimizer.step(closure)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [({"sam_rho": float("inf")}, ValueError, "sam_rho=inf"), ({"sam_adaptive": "no"}, TypeError, "sam_adaptive='no'")],
)
def test_loading_a_state_that_is_not_valid(change: dict[str, Any], error: type[Exception], message: str) -> None:
    optimizer = SAM(params(), SGD)
    state = optimizer.state_dict()
    state["param_groups"][0].update(change)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["sam_rho"] == 0.05
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({**state, "param_groups": []})
