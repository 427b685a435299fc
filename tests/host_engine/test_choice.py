"""Which engine steps, and why: names, the environment, and what the report says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_optim.engines import ENGINES
from lightning_optim.optimizers import AdamWOptim, Lion, SGDOptim
from lightning_optim.warnings import LightningOptimWarning

from .common import NO_COMPILER, needs_compiler, run


def test_an_unknown_engine_is_named_with_the_valid_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_OPTIM_ENGINE", raising=False)
    with pytest.raises(ValueError, match="engine='cuda' is not an engine; valid: auto, eager, foreach, host"):
        SGDOptim([nn.Parameter(torch.ones(1))], engine="cuda")
    monkeypatch.setenv("LIGHTNING_OPTIM_ENGINE", "gpu")
    message = (
        "the environment variable LIGHTNING_OPTIM_ENGINE='gpu' is not an engine; valid: auto, eager, foreach, host"
    )
    with pytest.raises(ValueError, match=message):
        SGDOptim([nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if engine.unavailable() is None])
def test_the_environment_overrides_the_argument(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_OPTIM_ENGINE", engine)
    assert run(engine="eager")[1].engine_report().count(f": {engine} (requested)") == 2
    monkeypatch.setenv("LIGHTNING_OPTIM_ENGINE", "")  # set, but empty: as if it were not
    assert run(engine="eager")[1].engine_report().count(": eager (requested)") == 2


@needs_compiler
def test_the_report_says_before_and_after_the_first_step_what_runs(fresh: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 4)[:, :2]), nn.Parameter(torch.ones(2).double())]
    optimizer = AdamWOptim(params)
    before = optimizer.engine_report()
    assert not optimizer.state, "a report is not a step"
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.engine_report() == before
    lines = before.splitlines()
    kinds = "(p float32, g float32, exp_avg float32, exp_avg_sq float32)"
    assert lines[0] == f"AdamW, 1 tensors on cpu {kinds}: host (the fastest that supports it)"
    assert lines[1] == f"AdamW, 1 tensors on cpu {kinds}: foreach (the fastest that supports it)"
    assert lines[2] == "  not host: the weights have gaps or overlaps in memory"
    assert "p float64" in lines[3]
    assert lines[3].endswith("host (the fastest that supports it)")
    # A gradient of another type is another kernel, and the report says so.
    optimizer = AdamWOptim(params[:1])
    optimizer._stepper.step(grads={params[0]: torch.ones(3, dtype=torch.bfloat16)})
    assert "g bfloat16" in optimizer.engine_report()


def test_the_report_on_a_device_without_the_engine(fresh: pytest.MonkeyPatch) -> None:
    optimizer = SGDOptim([nn.Parameter(torch.empty(2, device="meta"))], engine="host")
    if NO_COMPILER is None:
        with pytest.warns(LightningOptimWarning, match="the weights are on meta, not on the CPU"):
            report = optimizer.engine_report()
        assert "foreach (in place of host)\n  not host: the weights are on meta, not on the CPU" in report
    assert "not host" not in SGDOptim([nn.Parameter(torch.empty(2, device="meta"))]).engine_report()


def test_a_type_that_c_has_not_is_passed_over(fresh: pytest.MonkeyPatch) -> None:
    if NO_COMPILER is not None:
        pytest.skip(NO_COMPILER)
    p = nn.Parameter(torch.ones(4))
    optimizer = Lion([p], lr=0.5)
    grad = torch.ones(4).to(torch.float8_e5m2)
    optimizer._stepper.step(grads={p: grad})
    assert p.tolist() == [0.5] * 4
    assert "not host: g is stored as torch.float8_e5m2" in optimizer.engine_report()
