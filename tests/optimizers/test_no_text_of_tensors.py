"""Nothing writes tensors out, unless for a message: it takes a millisecond for each, and waits for a CUDA device."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from lightning_optim.offload import Detached, DetachedOptions
from lightning_optim.registry import OPTIMIZERS


@pytest.fixture
def no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: torch.Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("a tensor was written out")

    for name in ("__repr__", "__format__", "__str__"):
        monkeypatch.setattr(torch.Tensor, name, write)


@pytest.mark.usefixtures("no_text")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_construction_steps_and_states(name: str) -> None:
    def weights() -> list[nn.Parameter]:
        return [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))]

    optimizer: Any = OPTIMIZERS[name].cls(params := weights())
    optimizer.add_param_group({"params": (more := weights()), "lr": 0.1, "layer_id": torch.tensor(3)})

    def loss() -> torch.Tensor:
        return sum(((p * p).sum() for p in [*params, *more]), torch.zeros(()))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(2):
        closure()
        optimizer.step(closure) if OPTIMIZERS[name].kind == "closure" else optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.usefixtures("no_text")
@pytest.mark.parametrize("make", [OPTIMIZERS["adamw"].cls, torch.optim.AdamW])
def test_a_detached_pipeline(make: Any) -> None:
    params = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))]
    optimizer = make(params)
    pipeline = Detached(optimizer, DetachedOptions())
    for _ in range(2):
        sum(((p * p).sum() for p in params), torch.zeros(())).backward()
        pipeline.step(max_grad_norm=1.0)
        pipeline.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
