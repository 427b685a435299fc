"""The logic of ``detached_deepspeed``, for either root of Lightning."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch.optim import Optimizer

from lightning_optim.control.deepspeed import deepspeed_config, refuse_its_own_optimizer
from lightning_optim.optimizers.base import RuleOptimizer


class DetachedDeepSpeed:
    """Makes Lightning's ``DeepSpeedStrategy`` step the optimizer that the module made, and no other in its place.

    Args:
        *args: Arguments of the Lightning strategy.
        offload_optimizer: Keep masters and state in host memory, and step there.
        **kwargs: Arguments of the Lightning strategy.

    Raises:
        ModuleNotFoundError: DeepSpeed is not installed.
        ValueError: The configuration has an optimizer of its own.
    """

    strategy_name: str
    config: Any
    lightning_module: Any
    optimizers: list[Any]

    def __init__(self, *args: Any, offload_optimizer: bool = True, **kwargs: Any) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ModuleNotFoundError(
                f"strategy={self.strategy_name!r} needs DeepSpeed: pip install 'lightning-optim[deepspeed]'",
                name="deepspeed",
            )
        super().__init__(*args, offload_optimizer=offload_optimizer, **kwargs)  # type: ignore[call-arg] # Lightning's
        refuse_its_own_optimizer(self.config)

    def _setup_model_and_optimizer(self, model: Any, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Any:
        """Adjust the configuration to the optimizer, before Lightning gives both to DeepSpeed."""
        if optimizer is None:
            raise ValueError(f"strategy={self.strategy_name!r} without an optimizer; valid: configure_optimizers")
        self._refuse_two_limits()
        self.config = deepspeed_config(self.config, optimizer)
        return super()._setup_model_and_optimizer(model, optimizer, *args, **kwargs)  # type: ignore[misc]

    def report(self) -> str:
        """Which engine steps what DeepSpeed hands to the optimizer; under stage 3 not before the first step."""
        if not self.optimizers:
            return f"{self.strategy_name}: no training has begun"
        inner = getattr(self.optimizers[0], "optimizer", self.optimizers[0])
        if not isinstance(inner, RuleOptimizer):
            return f"{self.strategy_name}: {type(inner).__name__} runs its own step"
        lines = inner.engine_report().splitlines()
        return "\n".join(f"{self.strategy_name}: {line}" for line in lines or ["no step has been taken"])

    def _refuse_two_limits(self) -> None:
        """Refuse two limits of the norm: Lightning takes the configuration's, and silently ignores the Trainer's."""
        ours, trainers = self.config.get("gradient_clipping"), self.lightning_module.trainer.gradient_clip_val
        if trainers and ours != trainers:
            raise ValueError(
                f"gradient_clip_val={trainers!r} of the Trainer, but gradient_clipping={ours!r} in the DeepSpeed "
                "configuration; valid: one of them, or twice the same"
            )
