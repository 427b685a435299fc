"""The judge of the other tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import references
import torch
from torch import Tensor, nn

from lightning_optim.registry import OPTIMIZERS

from .common import Judge


def test_the_judge_notices_one_wrong_rounding() -> None:
    # A test that cannot fail is no test: one bfloat16 step, or 64 float32 roundings, are noticed.
    for dtype, change in ((torch.bfloat16, 2.0**-8), (torch.float32, 2.0**-18), (torch.float64, 2.0**-47)):
        p = nn.Parameter(torch.linspace(1.0, 1.9, 9).to(dtype))
        p.grad = torch.ones_like(p)
        optimizer = OPTIMIZERS["adamw"].create([p], lr=0.02, engine="eager")
        judge = Judge("adamw", optimizer)
        judge.before()
        optimizer.step()
        judge.after()
        with torch.no_grad():
            p[3] += change * p[3]
        with pytest.raises(AssertionError, match="is not in"):
            judge.after()


def test_a_reference_may_know_all_parameters_and_more_than_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def updates(ps: Sequence[Tensor], gs: Any, ss: Any, os: Any, *, hessian: Sequence[Tensor]) -> list[Any]:
        d = sum(float(g.sum() * h.sum()) for g, h in zip(gs, hessian, strict=True))
        for s in ss:
            s["d"] = torch.tensor(d)
        return [(o["lr"] * d, g) for g, o in zip(gs, os, strict=True)]

    made = references.Reference("decoupled", {}, {}, updates, inputs=("hessian",), everywhere=("d",))
    monkeypatch.setitem(references.REFERENCES, "made", made)
    ones = torch.ones(2, dtype=torch.float64)
    group = {"lr": 0.1, "weight_decay": 0.5}
    states: list[dict[str, Tensor]] = [{}, {"d": torch.tensor(7.0)}, {}]
    inputs = {"hessian": [2 * ones, None, ones]}
    new = references.step_all("made", [ones] * 3, [ones, None, ones], states, [group] * 3, inputs=inputs)
    moved = 1 - 0.1 * 12 * (0.5 + 1)  # decay goes by the effective size, which is of both
    assert [p.tolist() for p, _ in new] == [pytest.approx([moved] * 2), [1.0, 1.0], pytest.approx([moved] * 2)]
    assert [float(s["d"]) for _, s in new] == [12.0] * 3
    assert states == [{}, {"d": torch.tensor(7.0)}, {}], "what is given stays"
