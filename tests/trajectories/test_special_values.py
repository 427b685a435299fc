"""NaN and infinity go where the reference has them, and no finite number becomes one on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import references
import torch
from torch import Tensor, nn

from lightning_optim.optimizers import SGDOptim
from lightning_optim.registry import OPTIMIZERS

from .common import ALL_CASES, ENGINE, group_of, inputs_of, known_of, running_engines, take_step, wide


@pytest.mark.matrix(
    unless=lambda name, case, dtype: (
        case == "default" if dtype == torch.float32 else references.representative(name) and case in references.TELLING
    )
)
@pytest.mark.parametrize(("name", "case"), ALL_CASES)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float32, "nearest"),
        (torch.float16, "nearest"),
        (torch.bfloat16, "nearest"),
        (torch.bfloat16, "stochastic"),
        (torch.bfloat16, "kahan"),
    ],
    ids=str,
)
def test_nan_and_infinity_go_where_the_reference_has_them(
    name: str, case: str, dtype: torch.dtype, rounding: str
) -> None:
    """Where the reference's values are finite, all engines' are; NaN and infinity are the same on all engines."""
    options = {**references.cases(name)[case], "rounding": rounding}
    special = [math.nan, math.inf, -math.inf, 1.0, -1.0, 0.0] * 4
    starts = [torch.linspace(-1.5, 1.5, 24).reshape(4, 6).to(dtype), torch.ones(3).to(dtype)]
    gradients = [
        [torch.tensor(special).reshape(4, 6).to(dtype), torch.ones(3).to(dtype)],
        [torch.linspace(1, -1, 24).reshape(4, 6).to(dtype), torch.ones(3).to(dtype)],
        [torch.tensor(special[2:] + special[:2]).reshape(4, 6).to(dtype), torch.ones(3).to(dtype)],
    ]
    seen: dict[str, list[Tensor]] = {}
    for engine in running_engines():
        params = [nn.Parameter(start.clone()) for start in starts]
        optimizer = OPTIMIZERS[name].create(params, **{**options, "engine": engine})
        exact: list[tuple[Tensor, dict[str, Tensor]]] = [(wide(p), {}) for p in params]
        seen[engine] = []
        for row in gradients:
            for p, g in zip(params, row, strict=True):
                p.grad = g.clone()
            coefficient = clip_coefficient_with_nan(row, options.get("max_grad_norm"))
            groups = [known_of(p, group_of(optimizer, p)) for p in params]
            inputs = inputs_of(name, params, 0)
            take_step(optimizer, inputs)
            old, states = [value for value, _ in exact], [state for _, state in exact]
            exact = references.step_all(
                name,
                old,
                [coefficient * wide(g) for g in row],
                states,
                groups,
                inputs={key: [wide(given[p]) for p in params] for key, given in inputs.items()},
            )
            for p, (value, state) in zip(params, exact, strict=True):
                assert torch.equal(p.detach().isfinite(), value.isfinite()), engine
                seen[engine].append(p.detach().clone())
                for slot, expected in state.items():
                    stored = optimizer.state[p][slot]
                    assert torch.equal(stored.isfinite(), expected.isfinite()), (engine, slot)
                    seen[engine].append(stored.clone())
    for engine in running_engines()[1:]:
        for a, b in zip(seen["eager"], seen[engine], strict=True):
            assert torch.equal(a.isnan(), b.isnan()), engine
            assert torch.equal(a.isinf() * a.sign(), b.isinf() * b.sign()), engine


@ENGINE
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_a_nan_of_all_ones_stays_a_nan(rounding: str, engine: str) -> None:
    """Rounding its bits as a number's would carry into the sign, and make it a zero."""
    p = nn.Parameter(torch.ones(6, dtype=torch.bfloat16))
    g = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF, 0x7FC00000, 0], dtype=torch.int32).view(torch.float32)
    assert g.isnan().tolist() == [True] * 5 + [False]
    options: dict[str, Any] = {"state_dtype": "bfloat16", "rounding": rounding, "engine": engine}
    optimizer = SGDOptim([p], lr=1.0, momentum=0.5, **options)
    for _ in range(2):
        optimizer._stepper.step(grads={p: g})
        assert p.isnan().tolist() == g.isnan().tolist()
        assert optimizer.state[p]["momentum_buffer"].isnan().tolist() == g.isnan().tolist()


def clip_coefficient_with_nan(gradients: Sequence[Tensor], max_norm: float | None) -> float:
    if max_norm is not None and any(g.isnan().any() for g in gradients):
        return math.nan
    return references.clip_coefficient(gradients, max_norm)


@ENGINE
@pytest.mark.parametrize("scale", [1e-30, 1e25], ids=str)
def test_clipping_does_not_square_in_float32(scale: float, engine: str) -> None:
    """Squares of 1e25 and of 1e-30 are not float32 numbers; their norms are."""
    p = nn.Parameter(torch.zeros(100))
    p.grad = torch.full((100,), scale)
    optimizer = SGDOptim([p], lr=1.0, max_grad_norm=1.0, engine=engine)
    optimizer.step()
    assert optimizer.grad_norm is not None
    torch.testing.assert_close(float(optimizer.grad_norm), 10 * scale, rtol=1e-6, atol=0)
    expected = -0.1 if scale > 1 else -scale
    torch.testing.assert_close(p.detach(), torch.full((100,), expected), rtol=1e-6, atol=0)
