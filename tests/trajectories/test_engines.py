"""Engines among themselves: they differ by fused multiply-adds only."""

from __future__ import annotations

import pytest
import references
import torch

from lightning_optim.registry import OPTIMIZERS

from .common import ALL_CASES, OPTIMIZER, bits, give_gradients, group_of, running_engines, supported, weights


@pytest.mark.matrix(
    unless=lambda name, case: (
        case == "default" or (references.representative(name) and case in references.REFERENCES[name].variants)
    )
)
@pytest.mark.filterwarnings("ignore::lightning_optim.warnings.LightningOptimWarning")  # host passes some on
@pytest.mark.parametrize(("name", "case"), ALL_CASES)
def test_engines_differ_by_fused_multiply_adds_only(name: str, case: str) -> None:
    """From one state, in float32, each step.

    An engine may fuse a product and a sum, which spares the product's rounding, and sum a norm in another order.
    Four products at most are so on the way to a result, and each rounding is one of 2^-24 relative to the old or
    the new value; FUSED doubles that for what a square root or quotient makes of them.
    """
    fused = 8
    options = references.cases(name)[case]
    engines = running_engines()
    columns = {engine: weights(torch.float32) for engine in engines}
    optimizers = {e: OPTIMIZERS[name].create(columns[e], **{**options, "engine": e}) for e in engines}
    for step in range(8):
        olds = [p.detach().clone() for p in columns["eager"]]
        for engine in engines:
            give_gradients(columns[engine], step)
            optimizers[engine].step()
        for index, old in enumerate(olds):
            p = columns["eager"][index]
            for engine in engines[1:]:
                q = columns[engine][index]
                bound = fused * 2.0**-24 * torch.maximum(old.abs(), p.detach().abs())
                spread = references.REFERENCES[name].spread(group_of(optimizers["eager"], p))
                if spread and p.numel():
                    bound = bound + spread * 2.0**-24 * (p.detach() - old).abs().max()
                assert ((q.detach() - p.detach()).abs() <= bound).all(), (engine, index)
                q.detach().copy_(p.detach())
                for slot, value in optimizers["eager"].state[p].items():
                    mine = optimizers[engine].state[q][slot]
                    size = max(1.0, float(value.abs().max()) if value.numel() else 0.0)
                    unit = 2.0**-8 if value.dtype == torch.bfloat16 else fused * 2.0**-24  # one bfloat16 step
                    torch.testing.assert_close(mine, value, rtol=0, atol=2 * unit * size)
                    mine.copy_(value)


@references.common_to_all
@OPTIMIZER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_foreach_in_parts_is_foreach(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = weights(dtype), weights(dtype)
    options = {**references.BASE[name], "engine": "foreach", "rounding": "stochastic"}
    options.update(supported(name, {"cautious": True}))
    optimizers = [OPTIMIZERS[name].create(params, **options) for params in (whole, parts)]
    for step in range(4):
        for params, optimizer, limit in zip((whole, parts), optimizers, (1 << 26, 16), strict=True):
            monkeypatch.setattr("lightning_optim.engines.foreach.PART_ELEMENTS", limit)
            give_gradients(params, step)
            optimizer.step()
    for p, q in zip(whole, parts, strict=True):
        assert torch.equal(bits(p), bits(q))
