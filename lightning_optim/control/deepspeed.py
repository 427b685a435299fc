"""The DeepSpeed configuration with which DeepSpeed steps a given optimizer, and errors for what it cannot do with ours.

From stage 1 on, ZeRO copies the weights of each param group into one flat float32 tensor, divides that over the
processes, and gives the optimizer this process's part (stage 3: one part at a time) in place of the parameters. That
part is one-dimensional, begins and ends anywhere in a weight, and is padded with zeros. For element-wise rules this
changes nothing; a rule that needs a whole tensor, or the whole gradient, would silently compute something else.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.stepping.evaluations import request_of
from lightning_optim.stepping.stepper import Stepper
from lightning_optim.stepping.together import programs, why_together

FORCE, UNTESTED = "zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer"

_OFFLOAD_DEVICE = ("zero_optimization", "offload_optimizer", "device")

#: Torch's optimizers whose update of an element depends on other elements.
_OF_WHOLE_TENSORS = (torch.optim.Adafactor, torch.optim.Muon)

#: For each path of a setting, which values make DeepSpeed step its own Adam, or fail late with another optimizer.
_FOR_ITS_OWN_ADAM = {
    ("zero_optimization", "zenflow"): lambda value: value is not None,
    ("zero_optimization", "offload_optimizer", "super_offload"): bool,
    ("zero_optimization", "offload_optimizer", "ratio"): lambda value: value != 1,
    ("fp16", "fp16_master_weights_and_grads"): bool,
    ("bf16", "bf16_master_weights_and_grads"): bool,
}


def deepspeed_config(config: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A DeepSpeed configuration with which this very optimizer is stepped.

    Without it, DeepSpeed refuses optimizers that it does not know, and optimizer offload refuses all but its own
    (under Accelerate it takes ``DeepSpeedCPUAdam`` in place of whatever it was given, and says nothing). Everything
    else in the configuration stays as it is. For DeepSpeed's own optimizers nothing changes.

    Args:
        config: The configuration for ``deepspeed.initialize``; it is not changed.
        optimizer: The optimizer that DeepSpeed is given: one of ours, or any other.

    Returns:
        A copy, with ``zero_force_ds_cpu_optimizer`` false and, for optimizers of ours under ZeRO,
        ``zero_allow_untested_optimizer`` true.

    Raises:
        TypeError: The configuration is not a dict.
        ValueError: The configuration asks for another optimizer, or the optimizer's rule or options do not work with
            DeepSpeed, such as on ZeRO's flat partitions; the message names what does.

    With Accelerate, before ``accelerator.prepare``::

        if (plugin := accelerator.state.deepspeed_plugin) is not None:
            plugin.deepspeed_config.update(deepspeed_config(plugin.deepspeed_config, optimizer))

    >>> import lightning_optim
    >>> optimizer = lightning_optim.Lion([torch.nn.Parameter(torch.zeros(2))])
    >>> offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    >>> config = deepspeed_config({"zero_optimization": offload}, optimizer)
    >>> config["zero_force_ds_cpu_optimizer"], config["zero_allow_untested_optimizer"]
    (False, True)
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"the DeepSpeed configuration is a {type(config).__name__}; valid: a dict")
    adjusted = deepcopy(dict(config))
    stage = zero_stage(config)
    if _is_deepspeeds(optimizer):
        return adjusted
    name = _name(optimizer)
    refuse_its_own_optimizer(config)
    if config.get(FORCE):
        raise ValueError(
            f"{FORCE}={config[FORCE]!r} in the DeepSpeed configuration is for deepspeed.ops.adam.DeepSpeedCPUAdam, and "
            f"would have it step in place of {name}; valid: false, or to leave it out"
        )
    if UNTESTED in config and not config[UNTESTED] and isinstance(optimizer, RuleOptimizer) and stage:
        raise ValueError(
            f"{UNTESTED}={config[UNTESTED]!r} in the DeepSpeed configuration has DeepSpeed refuse {name}; valid: true, "
            "or to leave it out"
        )
    for path, clashes in _FOR_ITS_OWN_ADAM.items():
        value = _get(config, path)
        if value is not None and clashes(value):
            raise ValueError(
                f"{'.'.join(path)}={value!r} in the DeepSpeed configuration is for DeepSpeed's own Adam, not for "
                f"{name}; valid: to leave it out"
            )
    if isinstance(optimizer, RuleOptimizer) and _get(config, _OFFLOAD_DEVICE) == "nvme":
        raise ValueError(
            f"{'.'.join(_OFFLOAD_DEVICE)}='nvme' in the DeepSpeed configuration with {name}: DeepSpeed takes the state "
            "away to files between steps, and no such run has been seen with optimizers of lightning-optim; valid: "
            "'cpu', 'none'"
        )
    _refuse_closures(optimizer, name)
    if stage:
        _refuse_what_needs_whole_tensors(optimizer, name, stage)
    adjusted[FORCE] = False
    if isinstance(optimizer, RuleOptimizer) and stage:
        adjusted[UNTESTED] = True
    return adjusted


def refuse_its_own_optimizer(config: Mapping[str, Any]) -> None:
    """Check that a configuration leaves the choice of the optimizer to the code.

    Raises:
        ValueError: The configuration has an optimizer of its own.
    """
    if "optimizer" in config:
        raise ValueError(
            f"the DeepSpeed configuration has an optimizer of its own, {config['optimizer']!r}, which would be stepped "
            "in place of the one that the code made; valid: to leave 'optimizer' out"
        )


def zero_stage(config: Mapping[str, Any]) -> int:
    """The stage of ZeRO in a configuration; 0: nothing is divided.

    Raises:
        ValueError: There is no such stage.
    """
    zero = config.get("zero_optimization") or {}
    if zero is True:  # old configurations have this
        return 1
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else zero
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage={stage!r} in the DeepSpeed configuration; valid: 0, 1, 2, 3")
    return int(stage)


def _get(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def _name(optimizer: Optimizer) -> str:
    cls: Any = type(optimizer)
    return cls.public_name() if hasattr(cls, "public_name") else f"{cls.__module__}.{cls.__qualname__}"


def _is_deepspeeds(optimizer: Optimizer) -> bool:
    return any(cls.__module__.partition(".")[0] == "deepspeed" for cls in type(optimizer).__mro__)


def _refuse_closures(optimizer: Optimizer, name: str) -> None:
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    required = closure is not None and closure.default is inspect.Parameter.empty  # as torch's LBFGS
    # A SAM that is not ours has a `perturb`, which is called between two evaluations.
    if required or request_of(optimizer) is not None or hasattr(optimizer, "perturb"):
        raise ValueError(
            f"{name} evaluates the model again for its step, and DeepSpeed steps without a closure, once; valid: "
            f"{', '.join(_elementwise())}, or torch's that need none"
        )


def _refuse_what_needs_whole_tensors(optimizer: Optimizer, name: str, stage: int) -> None:
    zero = f"under ZeRO stage {stage}"
    if isinstance(optimizer, _OF_WHOLE_TENSORS) or (
        isinstance(optimizer, RuleOptimizer) and (type(optimizer._stepper) is not Stepper or _reduces(optimizer))
    ):
        raise ValueError(
            f"{name} {zero}: its step looks at whole tensors (a norm, or a product of matrices), and what it would be "
            "given there is a flat piece of many; valid: stage 0, or what is element-wise: "
            f"{', '.join(_elementwise())}"
        )
    if not isinstance(optimizer, RuleOptimizer):
        return
    if (reason := why_together(type(optimizer), optimizer.param_groups)) is not None:
        raise ValueError(
            f"{name} {zero}: {reason}, and what it would be given there is a part of them; valid: stage 0, or what is "
            f"element-wise: {', '.join(_elementwise())}"
        )
    if any(group.get("cautious") for group in optimizer.param_groups):
        raise ValueError(
            f"{name}(cautious=True) {zero}: updates are scaled by the share that is kept of each tensor, and what it "
            "would be given there is a flat piece of many; valid: cautious=False, or stage 0"
        )
    options = optimizer.options
    if options.max_grad_norm is not None:
        raise ValueError(
            f"{name}(max_grad_norm={options.max_grad_norm!r}) {zero}: the norm would be of this process's piece of one "
            "param group; valid: None, and gradient_clipping of the DeepSpeed configuration (gradient_clip_val of a "
            "Lightning Trainer), or stage 0"
        )
    rounds_state = options.rounding == "stochastic" and options.state_dtype == torch.bfloat16
    if options.rounding != "nearest" and not rounds_state:
        raise ValueError(
            f"{name}(rounding={options.rounding!r}) {zero}: it would step float32 copies, and DeepSpeed rounds them to "
            "the weights' type itself, to nearest; valid: 'nearest', 'stochastic' with state_dtype='bfloat16', or "
            "stage 0"
        )
    if options.capture:
        raise ValueError(
            f"{name} with capture_steps() {zero}: param groups are stepped one after the other, in one step of the "
            "optimizer each; valid: capture_steps(False), or stage 0"
        )


def _reduces(optimizer: RuleOptimizer) -> bool:
    """Whether the rule itself takes a norm, a sum or a mean of a tensor."""
    return any(program.reduces for program in programs(type(optimizer), optimizer.param_groups))


def _elementwise() -> list[str]:
    from lightning_optim.registry import OPTIMIZERS

    return [
        info.cls.public_name()
        for info in OPTIMIZERS.values()
        if info.kind == "elementwise" and not getattr(info.cls, "request", None)
    ]
