"""Tensors out of the ordinary: of several chunks, with gaps in memory, complex, tied."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import references
import torch
from torch import nn

from lightning_optim.engines.host.engine import CHUNK
from lightning_optim.optimizers import SGDOptim
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.warnings import LightningOptimWarning

from .common import ENGINE, OPTIMIZER, judged_run, supported, takes_complex


@references.common_to_all
@ENGINE
@OPTIMIZER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_tensors_of_several_chunks(name: str, dtype: torch.dtype, engine: str) -> None:
    random = torch.Generator().manual_seed(3)
    shapes = [(CHUNK + 7, 1), (CHUNK - 1,), (3,)]  # enough in all for the host engine to use threads
    params = [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in shapes]
    options = {"weight_decay": 0.1, "max_grad_norm": 1.0, **supported(name, {"cautious": True}), "engine": engine}
    options = {**references.BASE[name], **options}
    judged_run(name, options, params, steps=3, reload_at=1)


@references.common_to_all
@ENGINE
@OPTIMIZER
@pytest.mark.filterwarnings("ignore::lightning_optim.warnings.LightningOptimWarning")  # host passes these on
def test_weights_with_gaps_in_memory(name: str, engine: str) -> None:
    bases = [torch.full((6, 8), 7.0), torch.full((9,), 7.0), torch.full((4, 4), 7.0)]
    params = [nn.Parameter(bases[0][:, 2:7]), nn.Parameter(bases[1][::2]), nn.Parameter(bases[2])]
    around = [bases[0][:, [0, 1, 7]].clone(), bases[1][1::2].clone()]
    optimizer = judged_run(
        name, {**references.BASE[name], **supported(name, {"cautious": True}), "engine": engine}, params, steps=8
    )
    assert torch.equal(bases[0][:, [0, 1, 7]], around[0]), "memory between the weights was written to"
    assert torch.equal(bases[1][1::2], around[1]), "memory between the weights was written to"
    if engine == "host":
        report = optimizer.engine_report()
        assert "foreach" in report
        assert "not host: the weights have gaps or overlaps in memory" in report


@references.common_to_all
@ENGINE
@pytest.mark.parametrize("name", [name for name in references.NAMES if takes_complex(name)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=["c64", "c128"])
def test_complex_weights_are_pairs_of_real_ones(name: str, dtype: torch.dtype, engine: str) -> None:
    """As in torch.optim: the same as stepping real and imaginary parts side by side in one tensor."""
    random = torch.Generator().manual_seed(4)
    complex_params = [nn.Parameter(torch.randn(s, generator=random, dtype=dtype)) for s in [(3, 2), (5, 1), (2, 2)]]
    real_params = [nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in complex_params]
    options = {"weight_decay": 0.1, **supported(name, {"cautious": True}), "max_grad_norm": 0.5, "engine": engine}
    options = {**references.BASE[name], **options}
    # Where complex weights are no matrices, pairs should be none.
    kinds: dict[str, dict[str, Any]] = {"muon": {"use_muon": False}, "soap": {"max_precond_dim": 1}}
    kind = kinds.get(name, {})
    ours = OPTIMIZERS[name].create([{"params": complex_params, **kind}], **options)
    pairs = OPTIMIZERS[name].create([{"params": real_params, **kind}], **options)
    for _ in range(5):
        for p, q in zip(complex_params, real_params, strict=True):
            p.grad = torch.randn(p.shape, generator=random, dtype=dtype)
            q.grad = torch.view_as_real(p.grad).clone()
        ours.step()
        pairs.step()
        for p, q in zip(complex_params, real_params, strict=True):
            assert torch.equal(torch.view_as_real(p.detach()), q.detach())


@ENGINE
def test_tied_weights_are_stepped_one_after_the_other(engine: str, recwarn: pytest.WarningsRecorder) -> None:
    storage = torch.ones(4)
    params = [nn.Parameter(storage), nn.Parameter(storage)]
    assert params[0].data_ptr() == params[1].data_ptr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LightningOptimWarning)  # requested by name, and passed over
        optimizer = SGDOptim(params, lr=0.5, weight_decay=1.0, engine=engine)
        for p in params:
            p.grad = torch.ones(4)
        optimizer.step()
    assert storage.tolist() == [-0.5] * 4  # 1 - (1 + 1) / 2 = 0, then 0 - (1 + 0) / 2
    assert ": eager (" in optimizer.engine_report()
