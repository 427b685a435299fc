"""What is changed in DeepSpeed's configuration, and what is refused; none of it needs DeepSpeed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from foreign import Foreign
from torch import nn

import lightning_optim
from lightning_optim.control.deepspeed import deepspeed_config, zero_stage
from lightning_optim.optimizers.sam import SAM
from lightning_optim.registry import OPTIMIZERS

pytestmark = pytest.mark.filterwarnings("ignore:.*the parameters have no names")

OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
OFFLOADED = {"zero_optimization": OFFLOAD, "gradient_clipping": 1.0}


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))]


@pytest.mark.parametrize("info", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_elementwise_optimizers_are_let_through(info: Any) -> None:
    optimizer = info.create(weights(), lr=0.1)
    if hasattr(info.cls, "request"):
        with pytest.raises(ValueError, match=r"evaluates the model again for its step, .* valid: Adam, AdamW, Lion"):
            deepspeed_config({}, optimizer)
        return
    for stage in (1, 2, 3):
        if info.kind == "elementwise":
            deepspeed_config({"zero_optimization": {"stage": stage}}, optimizer)
            continue
        with pytest.raises(ValueError, match=rf"under ZeRO stage {stage}: .* stage 0, .*: Adam, AdamW, Lion"):
            deepspeed_config({"zero_optimization": {"stage": stage}}, optimizer)
    deepspeed_config({}, optimizer)  # nothing is divided


def test_only_two_settings_are_changed() -> None:
    before = deepcopy(OFFLOADED)
    found = deepspeed_config(OFFLOADED, lightning_optim.Lion(weights(), lr=0.1))
    added = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    assert found == OFFLOADED | added
    assert before == OFFLOADED
    found["zero_optimization"]["stage"] = 3
    assert before == OFFLOADED


def test_what_does_not_matter_stays() -> None:
    config = {"zero_optimization": {"stage": 0}, "zero_allow_untested_optimizer": False}
    found = deepspeed_config(config, lightning_optim.Lion(weights(), lr=0.1))
    assert found == config | {"zero_force_ds_cpu_optimizer": False}


def test_optimizers_that_are_not_ours() -> None:
    """Whether DeepSpeed is to take what it has not tested is the user's to say."""
    foreign = Foreign(weights())
    assert deepspeed_config(OFFLOADED, foreign) == OFFLOADED | {"zero_force_ds_cpu_optimizer": False}
    untested = OFFLOADED | {"zero_allow_untested_optimizer": False}
    assert deepspeed_config(untested, foreign) == untested | {"zero_force_ds_cpu_optimizer": False}


def test_deepspeeds_own_optimizers() -> None:
    theirs = type("DeepSpeedCPUAdam", (torch.optim.SGD,), {"__module__": "deepspeed.ops.adam.cpu_adam"})(weights())
    forced = OFFLOADED | {"zero_force_ds_cpu_optimizer": True}
    assert deepspeed_config(forced, theirs) == forced
    assert deepspeed_config(OFFLOADED, theirs) == OFFLOADED


REFUSED_OPTIONS: dict[str, tuple[Callable[[], torch.optim.Optimizer], str]] = {
    "max_grad_norm": (
        lambda: lightning_optim.AdamW(weights(), max_grad_norm=0.5),
        r"AdamW\(max_grad_norm=0.5\) under ZeRO stage 2: .* valid: None, and gradient_clipping",
    ),
    "cautious": (
        lambda: lightning_optim.Lion([{"params": weights(), "cautious": True}]),
        r"Lion\(cautious=True\) under ZeRO stage 2: .*; valid: cautious=False, or stage 0",
    ),
    "kahan": (lambda: lightning_optim.SGD(weights(), lr=0.1, rounding="kahan"), r"SGD\(rounding='kahan'\) .*'nearest'"),
    "stochastic": (
        lambda: lightning_optim.Adam(weights(), rounding="stochastic"),
        r"Adam\(rounding='stochastic'\) .*'nearest'",
    ),
    "capture": (lambda: _captured(), r"Adam with capture_steps\(\) under ZeRO stage 2: .*capture_steps\(False\)"),
    "Adafactor": (
        lambda: torch.optim.Adafactor(weights()),
        r"torch.optim.*Adafactor under ZeRO stage 2: .*element-wise",
    ),
}


def _captured() -> torch.optim.Optimizer:
    optimizer = lightning_optim.Adam(weights())
    optimizer.capture_steps()
    return optimizer


@pytest.mark.parametrize("option", REFUSED_OPTIONS)
def test_options_that_need_whole_tensors_or_all_gradients(option: str) -> None:
    make, message = REFUSED_OPTIONS[option]
    with pytest.raises(ValueError, match=message):
        deepspeed_config(OFFLOADED, make())
    deepspeed_config({"zero_optimization": {"stage": 0}}, make())


def test_stochastic_rounding_of_the_state() -> None:
    deepspeed_config(OFFLOADED, lightning_optim.Adam(weights(), rounding="stochastic", state_dtype="bfloat16"))


EVALUATE_AGAIN: dict[str, Callable[[], torch.optim.Optimizer]] = {
    "torch.optim.lbfgs.LBFGS": lambda: torch.optim.LBFGS(weights()),
    "LBFGS": lambda: lightning_optim.LBFGS(weights()),
    "SAM": lambda: SAM(weights(), lightning_optim.SGD),
    "Sophia": lambda: lightning_optim.Sophia(weights()),
}


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("name", EVALUATE_AGAIN)
def test_optimizers_that_evaluate_the_model_again(name: str, stage: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} evaluates the model again for its step.*; valid: Adam, AdamW, Lion"):
        deepspeed_config({"zero_optimization": {"stage": stage}}, EVALUATE_AGAIN[name]())


REFUSED_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "forced": (
        {"zero_force_ds_cpu_optimizer": True},
        r"zero_force_ds_cpu_optimizer=True .*DeepSpeedCPUAdam, .* in place of Lion; valid: false",
    ),
    "untested": ({"zero_allow_untested_optimizer": False}, r"zero_allow_untested_optimizer=False .*refuse Lion"),
    "its own": ({"optimizer": {"type": "Adam"}}, r"optimizer of its own, \{'type': 'Adam'\}.*'optimizer' out"),
    "zenflow": (
        {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
        r"zero_optimization.zenflow=.*not for Lion",
    ),
    "super_offload": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
        r"zero_optimization.offload_optimizer.super_offload=True .*not for Lion; valid: to leave it out",
    ),
    "ratio": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        r"zero_optimization.offload_optimizer.ratio=0.5 .*not for Lion",
    ),
    "nvme": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        r"zero_optimization.offload_optimizer.device='nvme' .*with Lion: .*; valid: 'cpu', 'none'",
    ),
    "masters": ({"bf16": {"bf16_master_weights_and_grads": True}}, r"bf16.bf16_master_weights_and_grads=True .*Lion"),
    "stage": ({"zero_optimization": {"stage": "two"}}, r"zero_optimization.stage='two' .*valid: 0, 1, 2, 3"),
}


@pytest.mark.parametrize("setting", REFUSED_SETTINGS)
def test_settings_for_another_optimizer(setting: str) -> None:
    change, message = REFUSED_SETTINGS[setting]
    with pytest.raises(ValueError, match=message):
        deepspeed_config(OFFLOADED | change, lightning_optim.Lion(weights()))


def test_not_a_configuration() -> None:
    with pytest.raises(TypeError, match="the DeepSpeed configuration is a str; valid: a dict"):
        deepspeed_config("ds_config.json", lightning_optim.Lion(weights()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "stage"),
    [
        ({}, 0),
        ({"zero_optimization": {}}, 0),
        ({"zero_optimization": True}, 1),
        ({"zero_optimization": False}, 0),
        ({"zero_optimization": {"stage": 3}}, 3),
    ],
)
def test_stages(config: dict[str, Any], stage: int) -> None:
    assert zero_stage(config) == stage


def test_nothing_is_imported_for_it() -> None:
    """A script for Accelerate needs no Lightning, and the check no DeepSpeed."""
    script = """
        import sys, torch, lightning_optim
        from lightning_optim.control.deepspeed import deepspeed_config
        deepspeed_config({"zero_optimization": {"stage": 2}}, lightning_optim.Lion([torch.nn.Parameter(torch.ones(2))]))
        found = {"deepspeed", "accelerate", "lightning", "pytorch_lightning"} & set(sys.modules)
        assert not found, found
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
