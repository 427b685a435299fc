"""Steps of the matrix kind on an engine that decides on the device whether a step is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim.engines.scaling import LossScale

from .common import Launches, give_gradients, make, weights

#: Two batches of matrices, and two vectors; none of them is aligned to 16 bytes in its batch but the first.
SHAPES: tuple[tuple[int, ...], ...] = ((5, 3), (5, 3), (7,), (9, 5), ())


def pair(
    dtype: torch.dtype = torch.float32, name: str = "muon", **options: Any
) -> tuple[list[nn.Parameter], Any, list[nn.Parameter], Any]:
    ours, theirs = weights(dtype, SHAPES), weights(dtype, SHAPES)
    return ours, make(name, ours, **options), theirs, make(name, theirs, **{**options, "engine": "eager"})


@pytest.mark.parametrize(("name", "options"), [("muon", {}), ("soap", {"precondition_frequency": 1})])
def test_an_infinite_gradient_of_either_kind_leaves_the_whole_step_out(name: str, options: dict[str, Any]) -> None:
    ours, optimizer, theirs, eager = pair(name=name, **options)
    scale, found = torch.tensor(1024.0), torch.zeros(())
    for step in range(7):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for p in ours:
            assert p.grad is not None
            p.grad *= scale
        skipped = step in (0, 2, 3)  # the first step of all, and then a matrix, and a vector
        if skipped:
            ours[0 if step < 3 else 2].grad.view(-1)[1] = torch.inf  # type: ignore[union-attr] # it has one
        before = [p.detach().clone() for p in ours]
        with torch.no_grad():
            optimizer._stepper.step(loss=LossScale(scale, found.zero_()), max_grad_norm=0.7)
            if not skipped:
                eager._stepper.step(max_grad_norm=0.7)
        assert bool(found) == skipped
        moved = not all(torch.equal(p, q) for p, q in zip(ours, before, strict=True))
        assert moved == (not skipped and not (name == "soap" and step == 1))  # whose first gradient only makes state
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for slot, value in eager.state[q].items():
            torch.testing.assert_close(optimizer.state[p][slot], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stochastic_rounding_counts_each_step_once(dtype: torch.dtype) -> None:
    """Also where both Programs of a matrix round: its momentum, and then the weight."""
    ours, optimizer, theirs, eager = pair(dtype, rounding="stochastic", state_dtype="bfloat16")
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        eager.step()
    assert {float(optimizer.state[p]["step"]) for p in ours} == {3.0}
    for p, q in zip(ours, theirs, strict=True):
        # The same noise: another number comes out where float32 differs in its last bits, one time in thousands.
        torch.testing.assert_close(p, q, rtol=2**-7 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


def test_launches_do_not_grow_with_the_number_of_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for number in (3, 30):
        params = [nn.Parameter(torch.ones(4, 3)) for _ in range(number)]
        optimizer = make("muon", params)
        with monkeypatch.context() as patch:
            log = Launches(patch, run=False)
            give_gradients(params, 0)
            optimizer.step()
        counts.append(log.names)
    # Directions, and moves: for each the scalars and one pass over memory.
    assert counts == [["scalars_0", "sweep_0"] * 2] * 2
