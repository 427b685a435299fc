"""What is refused, with the valid choices, and what reports say."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from foreign import Foreign
from torch import nn

import lightning_optim
from lightning_optim.offload import Detached, DetachedOptions
from lightning_optim.offload.link import SimulatedLink

from .common import PAIRS, back_and_step, detached, known_warnings, loss_of, small, weights

pytestmark = known_warnings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"master_dtype": "bfloat16"}, "master_dtype='bfloat16'; valid: float32, float64"),
        ({"master_dtype": "float16"}, "master_dtype='float16'; valid: "),
        ({"clip": "maybe"}, "clip='maybe'; valid: exact, speculative, none"),
        ({"bucket_mb": 0}, "bucket_mb=0; valid: megabytes, more than 0"),
        ({"bucket_mb": float("nan")}, "bucket_mb=nan; valid: megabytes"),
        ({"bucket_mb": "32"}, "bucket_mb='32' is a str; valid: megabytes"),
        ({"device_fraction": 1.5}, "device_fraction=1.5; valid: a number in [0, 1]"),
        ({"device_fraction": True}, "device_fraction=True is a bool; valid: a number in [0, 1]"),
        ({"delay_one_step": 1}, "delay_one_step=1 is not a bool; valid: True, False"),
        ({"delay_one_step": True, "clip": "none"}, "delay_one_step=True with clip='none': "),
        ({"delay_one_step": True, "device_fraction": 0.5}, "delay_one_step=True with device_fraction=0.5: "),
        ({"engine": "fast"}, "engine='fast' is not an engine; valid: auto, "),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        DetachedOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": "speculative"}, "clip='speculative' with Foreign, which runs its own step (cannot adopt "),
        ({"clip": "none"}, "clip='none' with Foreign"),
        ({"device_fraction": 0.5}, "device_fraction=0.5 with Foreign"),
    ],
)
def test_what_an_optimizers_own_step_cannot_serve(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Detached(Foreign(weights()), DetachedOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": "speculative"}, "clip='speculative' with Prodigy, which is stepped as a whole (its step keeps "),
        ({"clip": "none"}, "clip='none' with Prodigy"),
        ({"device_fraction": 0.5}, "device_fraction=0.5 with Prodigy"),
        ({"delay_one_step": True}, "delay_one_step=True with Prodigy"),
    ],
)
def test_what_a_step_of_all_parameters_cannot_serve(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Detached(lightning_optim.Prodigy(weights()), DetachedOptions(**options))


@pytest.mark.parametrize("options", [{"delay_one_step": True}, {"wait": "forward"}], ids=str)
def test_weights_on_their_way_are_not_to_be_put_elsewhere(options: dict[str, Any]) -> None:
    params = weights()
    with pytest.raises(ValueError, match=r"with ScheduleFreeAdamW: its eval.*must not be on their way; valid: "):
        Detached(lightning_optim.ScheduleFreeAdamW(params), DetachedOptions(**options), module=nn.ParameterList(params))


def test_the_weights_of_evaluation_and_back() -> None:
    """The masters keep their bits, and no step is made meanwhile."""
    params = weights()
    optimizer = lightning_optim.ScheduleFreeAdamW(params, lr=0.02)
    with detached(optimizer) as pipeline:
        for step in range(3):
            back_and_step(pipeline, loss_of(params, step))
            pipeline.zero_grad()
        before = [p.detach().clone() for p in params]
        masters = {p: master.detach().clone() for p, master in pipeline.masters().items()}
        optimizer.eval()
        assert not torch.equal(params[0], before[0])
        loss_of(params, 3).backward()
        with pytest.raises(RuntimeError, match=r"weights of evaluation; valid: train\(\)"):
            pipeline.step()
        optimizer.train()
        assert all(map(torch.equal, params, before))
        pipeline.step()
        other = weights()
        straight = lightning_optim.ScheduleFreeAdamW(other, lr=0.02)
        with detached(straight) as unbroken:
            for step in range(4):
                back_and_step(unbroken, loss_of(other, step))
                unbroken.zero_grad()
            assert all(map(torch.equal, params, other))
            assert all(map(torch.equal, pipeline.masters().values(), unbroken.masters().values()))
        assert any(not torch.equal(master, pipeline.masters()[p]) for p, master in masters.items())


def test_steps_that_cannot_be_taken_back() -> None:
    with pytest.raises(ValueError, match=r"clip='speculative' with Muon.*valid: exact, none"):
        Detached(lightning_optim.Muon(weights()), DetachedOptions(clip="speculative"))
    make = partial(lightning_optim.AdamW, state_dtype="float64")
    with pytest.raises(ValueError, match=r"state_dtype=torch.float64 and master_dtype=torch.float32.*valid: master_d"):
        Detached(make(weights()), DetachedOptions(clip="speculative"))
    Detached(make(weights()), DetachedOptions(clip="speculative", master_dtype="float64")).close()


def test_optimizers_that_evaluate_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"LBFGS, whose step evaluates the model"):
        Detached(torch.optim.LBFGS(weights()))


def test_links_out_of_range() -> None:
    for options in ({"bandwidth": 0}, {"bandwidth": float("nan")}, {"bandwidth": 1, "latency": -1},
                    {"bandwidth": 1, "jitter": -1}):  # fmt: skip
        name, value = list(options.items())[-1]
        with pytest.raises(ValueError, match=f"^{name}={value!r}; valid: "):
            SimulatedLink(**options)


def test_buckets_are_of_the_size_that_was_asked_for() -> None:
    params = [nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in (100, 200, 300, 50, 50, 800)]
    with detached(torch.optim.SGD(params, lr=0.1), small(bucket_mb=800e-6)) as pipeline:
        sizes = [[p.numel() for p in bucket.params] for bucket in pipeline.buckets]
    assert sizes == [[800], [50, 50, 300], [200, 100]]  # the last layers' gradients come first


def test_the_report() -> None:
    params = weights()
    with detached(PAIRS["adamw, amsgrad"][0](params), small(clip="speculative", bucket_mb=16)) as pipeline:
        (decision,) = pipeline.report()
        assert decision.bucket == (
            "tensors of 1 buckets (p float32, g float32, exp_avg float32, exp_avg_sq float32, max_exp_avg_sq float32) "
            "in host memory, masters in float32, clip='speculative', buckets of 16 MB"
        )
        loss_of(params, 0).backward()
        pipeline.step()
        (decision,) = pipeline.report()
        assert "copy bfloat16, undo_p float32" in decision.bucket
    params = weights()
    with detached(lightning_optim.Prodigy(params)) as pipeline:
        for _ in range(2):
            (decision,) = pipeline.report()
            assert decision.bucket.startswith("6 tensors in host memory")
            assert "all at once: its step keeps numbers that all of its parameters have in common" in decision.bucket
            loss_of(params, 0).backward()
            pipeline.step()
    with detached(Foreign(weights()), overlap=False) as pipeline:
        (decision,) = pipeline.report()
        assert decision.engine == "Foreign's own step"
        assert "cannot adopt foreign.Foreign" in decision.reason
        assert "gradients stay on the device until the step" in decision.bucket


def test_the_engine_that_was_asked_for_steps() -> None:
    for engine in ("eager", "foreach"):
        params = weights()
        for optimizer in (torch.optim.AdamW(params), lightning_optim.AdamW(params)):
            with detached(optimizer, small(engine=engine)) as pipeline:
                loss_of(params, 0).backward()
                pipeline.step()
                pipeline.zero_grad()
                assert {decision.engine for decision in pipeline.report()} == {engine}


def test_a_step_without_gradients_does_nothing() -> None:
    params = weights()
    with detached(PAIRS["torch AdamW"][0](params)) as pipeline:
        before = [p.detach().clone() for p in params]
        pipeline.step(max_grad_norm=1.0)
        assert all(map(torch.equal, params, before))
        assert pipeline.scaling is None
    empty = torch.optim.SGD([{"params": []}], lr=0.1)
    with detached(empty) as pipeline:
        pipeline.step()
        assert pipeline.masters() == {}
