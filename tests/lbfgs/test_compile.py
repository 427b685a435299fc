"""``torch.compile`` of what calls ``step`` compiles the closure, once, and nothing of the optimizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim.stepping.outside_of_graphs import stay_outside

pytest.importorskip("torch._dynamo")
from torch._dynamo.testing import CompileCounter  # takes a second

sam = partial(lightning_optim.SAM, base=partial(lightning_optim.SGD, lr=0.05))


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*Profiler record function")
@pytest.mark.parametrize(
    ("compiled", "make"),
    [
        ("closure", lightning_optim.LBFGS),
        ("loop", lightning_optim.LBFGS),
        ("step", partial(lightning_optim.LBFGS, line_search="armijo")),
        ("model", sam),
        ("loop", sam),
    ],
)
def test_graphs(compiled: str, make: Any) -> None:
    """More iterations than dynamo would recompile for. What it saw, and weights are those without."""
    losses, counter = [], CompileCounter()
    for compiles in (False, True):
        torch.manual_seed(0)
        net, x = nn.Linear(4, 1), torch.randn(16, 4)
        optimizer = make(net.parameters())
        model = torch.compile(net, backend=counter) if compiles and compiled == "model" else net

        def closure(optimizer: Any = optimizer, model: Any = model, x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            return loss

        evaluate, step = closure, optimizer.step
        if compiles and compiled == "closure":
            evaluate = torch.compile(closure, backend=counter)
        if compiles and compiled == "step":
            step = torch.compile(optimizer.step, backend=counter)

        def loop(step: Any = step, evaluate: Any = evaluate) -> Any:
            return step(evaluate)

        run = torch.compile(loop, backend=counter) if compiles and compiled == "loop" else loop
        for _ in range(10):
            run()
        losses.append(closure().item())
    assert counter.frame_count == 1
    assert counter.op_count < 10
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_torch_without_what_keeps_code_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._dynamo.decorators.skip_code")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    stay_outside(lightning_optim.SAM.__module__)
