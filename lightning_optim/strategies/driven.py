"""What all our strategies have in common: they step, clip and unscale in place of Lightning.

A strategy inherits from one of these classes, then from one of Lightning's own: see
:mod:`lightning_optim.strategies.lightning`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks

from lightning_optim.control.schedules.held import HeldSchedules
from lightning_optim.engines.choice import requested_engine
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.optimizers.sam import stepped
from lightning_optim.strategies.drive import Drive, two_limits
from lightning_optim.strategies.replay import Replays
from lightning_optim.strategies.scaler import InStepScaler
from lightning_optim.strategies.undo import Undoes

#: Stands for the base class that comes after these: a strategy of Lightning's, of either root.
_Strategy: Any = object


class Driven(Undoes, Replays, _Strategy):
    """Steps optimizers by our engines, with clipping and unscaling inside of the step.

    Args:
        *args: Arguments of the Lightning strategy.
        engine: The engine of torch's optimizers and, if it is not ``"auto"``, of ours as well.
        **kwargs: Arguments of the Lightning strategy, and ``undo``: see
            :class:`~lightning_optim.strategies.undo.Undoes`.

    Raises:
        ValueError: The engine is unknown.
    """

    #: The package of Lightning that the class is for.
    root: ClassVar[str]
    strategy_name: str

    def __init__(self, *args: Any, engine: str = "auto", **kwargs: Any) -> None:
        requested_engine(engine)
        super().__init__(*args, **kwargs)
        self.engine = engine
        self._drives: WeakKeyDictionary[Optimizer, Drive] | None = None  # made in `setup`: it does not pickle
        self._schedules = HeldSchedules()
        self._report = ""

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies, without that of a running training: threads, hooks and plans are made anew."""
        return {**super().__getstate__(), "_drives": None, "_window": None}

    # -- what a subclass may say differently --------------------------------------------------------------------

    def _new_drive(self, optimizer: Optimizer) -> Drive:
        """Make the drive that steps an optimizer from here on."""
        return Drive(optimizer, self.engine)

    def _take_over(self, optimizer: Optimizer, trainer: Any) -> None:
        """Prepare for the training with an optimizer, whose parameters have been placed on their devices."""
        self._drive(optimizer)

    # -- what Lightning calls -----------------------------------------------------------------------------------

    def setup(self, trainer: Any) -> None:
        """Set up as Lightning's own strategy does, then take the optimizers over."""
        super().setup(trainer)
        if trainer.state.fn == "fit":
            self._release()
            for optimizer in map(stepped, self.optimizers):
                self._check_limits(optimizer, trainer.gradient_clip_val)
                self._take_over(optimizer, trainer)
            self._take_plugin_over()

    def on_train_start(self) -> None:
        """Say which engine steps which optimizer."""
        super().on_train_start()
        if self.is_global_zero:
            import_module(f"{self.root}.utilities.rank_zero").rank_zero_info(self.report())

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step as Lightning's own strategy does, with our step in place of the optimizer's."""
        if self._skips_backward():
            return closure()  # there is nothing to step with: gradients, if any, are of an earlier step
        with self._drive(optimizer).in_place_of_its_own(stepped(optimizer)):
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        scaler = getattr(self.precision_plugin, "scaler", None)
        if isinstance(scaler, InStepScaler) and scaler.found_inf is not None:
            self._schedules.after_step(self._trainer, scaler.found_inf)
            scaler.found_inf = None
        return output

    def on_train_end(self) -> None:
        """Keep the report of what was done."""
        super().on_train_end()
        self._report = self.report()

    def teardown(self) -> None:
        """Leave the optimizers and the precision plugin as they were found."""
        try:
            self._release()
        finally:
            super().teardown()

    # -- what callbacks of ours call ----------------------------------------------------------------------------

    def clip_in_step(self, optimizer: Optimizer, max_norm: float) -> bool:
        """Clip the global norm inside of the step that is going on, if it is ours.

        Args:
            optimizer: The optimizer, whose step has been called, and has its gradients.
            max_norm: The limit.

        Returns:
            Whether it will be done; if not, the gradients are final and unscaled in ``p.grad``.
        """
        drive, inner = self._drive(optimizer), stepped(optimizer)
        if not drive.postpones(inner) or self._steps_have_hooks():
            return False
        drive.clip(inner, max_norm, lambda: None, has_its_own_way=False)
        return True

    def norm_in_step(self, optimizer: Optimizer) -> Tensor | None:
        """The global norm of the gradients of the last step, unscaled and not yet clipped; None if none was needed."""
        scaling = self._drive(optimizer).stepper(stepped(optimizer)).scaling
        return None if scaling is None else scaling.norm()

    # -- ours ---------------------------------------------------------------------------------------------------

    def report(self) -> str:
        """Which engine steps which optimizer, and why; after a training, the report from its end."""
        if self._drives is None:
            return self._report or f"{self.strategy_name}: no training has begun"
        return "\n".join(f"{self.strategy_name}: {self._described(optimizer)}" for optimizer in self.optimizers)

    def _described(self, optimizer: Optimizer) -> str:
        drive, outer, optimizer = self._drive(optimizer), optimizer, stepped(optimizer)
        cls = type(optimizer)
        name = f"{cls.__module__.partition('.')[0]}'s {cls.__name__.removesuffix('Optim')}"
        name = name if outer is optimizer else f"{type(outer).__name__} over {name}"
        if drive.own_step is not None:
            return f"{name} runs its own step: {drive.own_step}"
        decisions = drive.stepper(optimizer).report(scaled=self._scales_gradients())
        return f"{name} is stepped by: " + "\n  ".join(map(str, decisions))

    def _scales_gradients(self) -> bool:
        return self._max_norm is not None or isinstance(getattr(self.precision_plugin, "scaler", None), InStepScaler)

    @property
    def _max_norm(self) -> float | None:
        """The limit of the global norm that steps are given: the Trainer's, or that of a callback of ours."""
        limits = (callback.max_norm for callback in self._trainer.callbacks if _clips_in_step(callback))
        return self._trainer.gradient_clip_val or next(limits, None)

    @property
    def _trainer(self) -> Any:
        assert self.lightning_module is not None  # noqa: S101
        return self.lightning_module.trainer

    def drive_of(self, optimizer: Optimizer) -> Drive:
        """The drive that steps an optimizer, or the one in it: for callbacks."""
        return self._drive(optimizer)

    def _drive(self, optimizer: Optimizer) -> Drive:
        """The drive of an optimizer, or of the one in it."""
        optimizer = stepped(optimizer)
        # Drives are made here, not in `setup` alone, since callbacks may replace the optimizers at any time.
        if self._drives is None:
            self._drives = WeakKeyDictionary()
        if optimizer not in self._drives:
            self._drives[optimizer] = self._new_drive(optimizer)
        return self._drives[optimizer]

    def _check_limits(self, optimizer: Optimizer, gradient_clip_val: float | None) -> None:
        own = optimizer.options.max_grad_norm if isinstance(optimizer, RuleOptimizer) else None
        if own is not None and gradient_clip_val:
            raise ValueError(two_limits(type(optimizer).__name__, own, gradient_clip_val))

    def _take_plugin_over(self) -> None:
        """Replace the plugin's clipping and unscaling by ours, if it does them in Lightning's own way."""
        plugin: Any = self.precision_plugin
        if self._is_lightnings(plugin, "clip_gradients", "clip_grad_by_norm", "main_params"):
            plugin.clip_gradients = self._clip_gradients
        if InStepScaler.accepts(getattr(plugin, "scaler", None)) and self._is_lightnings(plugin, "optimizer_step"):
            plugin.scaler = InStepScaler(plugin.scaler, self._drive, self._gradients_are_seen, self._steps_by_itself)

    def _release(self) -> None:
        plugin: Any = self.precision_plugin
        if plugin.__dict__.get("clip_gradients") == self._clip_gradients:
            del plugin.clip_gradients
        if isinstance(scaler := getattr(plugin, "scaler", None), InStepScaler):
            plugin.scaler = scaler.scaler
        drives, self._drives = self._drives, None
        with ExitStack() as all_of_them:  # releases all, even if one raises, as a step under way may
            all_of_them.callback(self._schedules.release)
            for optimizer, drive in (drives or {}).items():
                all_of_them.callback(drive.release, optimizer)

    def _is_lightnings(self, plugin: Any, *methods: str) -> bool:
        roots = (self.root, "lightning.fabric", "lightning_fabric")
        replaced = plugin.__dict__.keys() & set(methods)
        return not replaced and all(getattr(type(plugin), name).__module__.startswith(roots) for name in methods)

    def _clip_gradients(self, optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: str = "norm") -> None:
        """The method that replaces the precision plugin's ``clip_gradients``."""
        plugin, module = self.precision_plugin, self.lightning_module
        assert module is not None  # noqa: S101
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # unwraps a LightningOptimizer

        def stock() -> None:
            type(plugin).clip_gradients(plugin, optimizer, clip_val, gradient_clip_algorithm)

        drive = self._drive(optimizer)
        inner = stepped(optimizer)
        waits = module.automatic_optimization and drive.postpones(inner) and not self._steps_have_hooks()
        if clip_val <= 0 or gradient_clip_algorithm != "norm" or not waits:
            stock()
        else:
            drive.clip(
                inner, clip_val, stock, has_its_own_way=not self._is_stock(module, "configure_gradient_clipping")
            )

    def _steps_by_itself(self) -> bool:
        """Whether Lightning makes backward passes and steps, rather than the module."""
        return bool(self._trainer.lightning_module.automatic_optimization)

    def _gradients_are_seen(self) -> bool:
        """Whether a hook between ``unscale_`` and the step may look at the gradients, or change them."""
        trainer = self._trainer
        hook = "on_before_optimizer_step"
        return (
            (trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value")
            or not self._is_stock(trainer.lightning_module, "configure_gradient_clipping")
            or not self._is_stock(trainer.lightning_module, hook)
            or not all(
                _clips_in_step(callback) or self._is_stock(callback, hook, "Callback") for callback in trainer.callbacks
            )
            or self._steps_have_hooks()
        )

    def _steps_have_hooks(self) -> bool:
        """Whether hooks of the optimizers' own see gradients: with a scaler a step comes after the backward pass."""
        scaler = getattr(self.precision_plugin, "scaler", None)
        hooks = (_global_optimizer_pre_hooks, *(stepped(one)._optimizer_step_pre_hooks for one in self.optimizers))
        return scaler is not None and any(hooks)

    def _is_stock(self, owner: Any, hook: str, base: str = "LightningModule") -> bool:
        stock = getattr(getattr(import_module(self.root), base), hook)
        return getattr(getattr(owner, hook), "__func__", None) is stock


def _clips_in_step(callback: Any) -> bool:
    """Whether a callback leaves gradients alone, and has them clipped inside of the step."""
    return bool(getattr(callback, "clips_in_step", False))


class OnOneDevice(_Strategy):
    """Base for strategies of a single device, which take the one that the Trainer is given."""

    strategy_name: str

    def __init__(self, device: torch.device | str | int | None = None, **kwargs: Any) -> None:
        super().__init__("cpu" if device is None else device, **kwargs)
        self._is_placed = device is not None

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The device, in a list; the Trainer reads and sets it by this name."""
        return [self.root_device] if self._is_placed else None

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) != 1:
            name = self.strategy_name
            raise ValueError(
                f"strategy={name!r} is for one device, and the Trainer has devices={len(devices)}; "
                f"valid: devices=1, or strategy='{name}_ddp' or '{name}_fsdp2'"
            )
        self._root_device = devices[0]
        self._is_placed = True


class Sharded(_Strategy):
    """Base for strategies over ``ModelParallelStrategy``: by default all processes divide the data."""

    def __init__(
        self, data_parallel_size: Literal["auto"] | int = "auto", tensor_parallel_size: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(data_parallel_size, tensor_parallel_size, **kwargs)

    def setup_environment(self) -> None:
        """Set how many processes divide the data, before Lightning applies its own default."""
        strategy: Any = self
        if strategy._data_parallel_size == "auto":
            strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes // strategy._tensor_parallel_size
        super().setup_environment()
