"""A step that fails leaves the optimizer as if it had not been tried, as far as nothing was written."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import lightning_optim
from lightning_optim.engines import ENGINES
from lightning_optim.engines.scaling import LossScale, Scaling
from lightning_optim.engines.triton import TritonEngine, engine
from lightning_optim.warnings import LightningOptimWarning


class Failing:
    """An engine's method that fails once."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error

    def __call__(self, owner: Any, *args: Any) -> Any:
        if (error := self.error) is not None:
            self.error = None
            raise error
        return self.method(owner, *args)

    method: Any = None


@pytest.mark.parametrize("name", ["run", "sum_of_squares"])
def test_a_failed_first_step_is_still_to_come(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(torch.OutOfMemoryError("no memory"))
    cls: Any = type(ENGINES["foreach"])
    failing.method = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda owner, *args: failing(owner, *args))
    ends = []
    for fails in (True, False):
        failing.error = torch.OutOfMemoryError("no memory") if fails else None
        weight = torch.nn.Parameter(torch.ones(2))
        # Dampening makes the first step another than the later ones.
        optimizer = lightning_optim.SGD(
            [weight], lr=0.1, momentum=0.9, dampening=0.5, engine="foreach", max_grad_norm=9.0
        )
        weight.grad = torch.ones(2)
        if fails:
            with pytest.raises(torch.OutOfMemoryError):
                optimizer.step()
            assert not optimizer.state[weight]
            gradient = weakref.ref(weight.grad)
            weight.grad = None
            gc.collect()
            assert gradient() is None  # memory that a second try will need
        for _ in range(2):
            weight.grad = torch.ones(2)
            optimizer.step()
        ends.append(weight.detach().clone())
    assert torch.equal(*ends)


def test_out_of_memory_is_not_taken_for_a_wrong_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Any, tensors: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(type(ENGINES["eager"]), "read", read)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        lightning_optim.SGD([weight], lr=0.1, engine="eager").step()


def test_the_norm_is_that_of_the_step_whatever_the_scaler_does_next() -> None:
    scale = torch.tensor(8.0)
    scaling = Scaling(1.0, LossScale(scale, torch.zeros(())), torch.tensor([64.0], dtype=torch.float64))
    scale.fill_(1.0)
    norm = scaling.norm()
    assert norm is not None
    assert norm.item() == 1.0


def test_triton_that_does_not_run_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine, "broken", lambda: "Triton's kernels do not run: no compiler")
    monkeypatch.setattr(engine, "missing", lambda: None)
    monkeypatch.setitem(ENGINES, "triton", TritonEngine())
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    monkeypatch.setattr("lightning_optim.warnings._seen", set())
    with pytest.warns(LightningOptimWarning, match="Triton's kernels do not run: no compiler"):
        lightning_optim.SGD([weight], lr=1.0, engine="triton").step()
    assert weight.tolist() == [0.0, 0.0]
