"""Rows and columns of matrices: slots, means over them, and who runs such rules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lightning_optim.warnings
from lightning_optim.engines import ENGINES
from lightning_optim.rules import Policy, Rule, Slot, Update
from lightning_optim.rules.ops import mean, norm
from lightning_optim.warnings import LightningOptimWarning

from .common import Sided, give_gradients, train, values, weights


def by_hand(steps: int) -> list[torch.Tensor]:
    ps = [p.detach() for p in weights(torch.float64)]
    state: list[dict[str, Any]] = [{} for _ in ps]
    for step in range(steps):
        holders = weights(torch.float64)
        give_gradients(holders, step)
        for i, p in enumerate(holders):
            g, s = p.grad, state[i]
            assert g is not None
            if g.ndim > 1:
                s["rows"] = 0.9 * s.get("rows", 0.0) + 0.1 * (g * g).mean(-1, keepdim=True)
                s["columns"] = 0.9 * s.get("columns", 0.0) + 0.1 * (g * g).mean(-2, keepdim=True)
                v = s["rows"] * s["columns"] / s["rows"].mean(-2, keepdim=True).clamp(min=1e-3)
            else:
                v = s["whole"] = 0.9 * s.get("whole", 0.0) + 0.1 * g * g
            ps[i] = ps[i] * (1 - 0.1 * 0.1) - 0.1 * g / (v + 1e-3).sqrt()
    return ps


@pytest.mark.parametrize("engine", ["eager", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rules_of_rows_and_columns(engine: str, dtype: torch.dtype) -> None:
    params = weights(dtype)
    optimizer = Sided(params, engine=engine)
    train(optimizer, params, range(4))
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    for p, q in zip(params, by_hand(4), strict=True):
        torch.testing.assert_close(p.detach().double(), q, rtol=tolerance, atol=tolerance)
    assert {name: tuple(value.shape) for name, value in optimizer.state[params[2]].items()} == {
        "rows": (2, 3, 1),
        "columns": (2, 1, 4),
    }
    assert set(optimizer.state[params[1]]) == {"whole"}


def test_such_a_run_is_resumed_bit_for_bit() -> None:
    params, others = weights(), weights()
    train(Sided(params), params, range(4))
    first = Sided(others)
    train(first, others, range(2))
    second = Sided(others)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, others, range(2, 4))
    for a, b in zip(values(params), values(others), strict=True):
        assert torch.equal(a, b)


def test_a_slot_of_another_shape_is_refused() -> None:
    params = weights()
    optimizer = Sided(params)
    train(optimizer, params, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["rows"] = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"rows has shape \(3, 4\)"):
        Sided(weights()).load_state_dict(saved)


@pytest.mark.skipif(ENGINES["host"].unavailable() is not None, reason="no compiler")
def test_the_report_says_why_no_kernel_runs_them() -> None:
    report = Sided(weights()).engine_report()
    assert "not host: a rule with values of rows and columns needs torch's own operators" in report


@pytest.mark.skipif(ENGINES["host"].unavailable() is not None, reason="no compiler")
def test_who_asks_for_a_kernel_is_told_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_optim.warnings, "_seen", set())
    params = weights()
    with pytest.warns(LightningOptimWarning, match="values of rows and columns .* stepping with foreach instead"):
        train(Sided(params, engine="host"), params, range(1))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, g, *, lr: lr * mean(mean(g, over="rows"), over="rows") * g, "over rows reduces elements"),
        (lambda p, g, *, lr: norm(mean(g, over="rows")) * g, r"norm\(\) reduces a tensor; it was given a column"),
    ],
)
def test_what_has_no_rows_is_not_reduced_over_them(function: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Update(Rule(function), Policy()).program  # noqa: B018 - tracing is what raises


def test_unknown_sides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mean\(\) over 'all'; valid: None, rows, columns"):
        mean(torch.ones(2, 2), over="all")


def test_a_row_is_not_stored_in_a_column() -> None:
    def crossed(p: Any, g: Any, rows: Any, *, lr: Any) -> Any:
        return g, mean(g, over="rows")

    with pytest.raises(TypeError, match="stores a column in rows, which is a row"):
        Update(Rule(crossed, slots={"rows": Slot(rate="row")}), Policy()).program  # noqa: B018
