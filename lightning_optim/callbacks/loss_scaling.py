"""Loss scaling of ``16-mixed`` with bounds, held schedules, and an end to runs that skip every step."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning_optim.callbacks.roots import Callback
from lightning_optim.checks import check_switch
from lightning_optim.control.loss_scale import MOST_SKIPPED, LossScaler, check_settings, loss_scaler_like
from lightning_optim.control.schedules.held import HeldSchedules
from lightning_optim.warnings import warn_once

#: What a scaler of torch's does unless its user says otherwise.
_DEFAULTS = {"init_scale": 2.0**16, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}


class LossScaling(Callback):
    """Scale the loss of ``precision="16-mixed"``, with a floor and a ceiling, and give up with an error that says why.

    During a fit a :class:`~lightning_optim.control.loss_scale.LossScaler` takes the place of the precision plugin's
    scaler, whose own settings do not count then. Schedules by step do not advance for steps that were skipped, under
    Lightning's strategies as under ours. (In manual optimization the module advances them itself:
    ``self.trainer.precision_plugin.scaler.step_was_skipped(optimizer)`` tells.) Checkpoints are interchangeable with
    those of runs without this callback; the settings are always those given here, and not the checkpoint's.

    In any other precision, such as ``bf16-mixed``, there is nothing to scale, which is said by a warning.

    Args:
        init_scale: What the loss is multiplied by at first.
        growth_factor: What the scale is multiplied by after ``growth_interval`` steps without an overflow.
        backoff_factor: What the scale is multiplied by after a step whose gradients were inf or NaN.
        growth_interval: Optimizer steps in a row without an overflow after which the scale grows.
        min_scale: The scale does not fall below this; None: it may fall to zero, as torch's does.
        max_scale: The scale does not grow beyond this; None: without a limit.
        max_skipped_steps: Skipped steps of one optimizer in a row after which the fit ends with an error that names the
            parameter whose gradient overflowed first; None: never.
        dynamic: With False the scale stays at ``init_scale``.
        log: Log ``loss_scale`` and ``skipped_steps`` (of all optimizers, since the run began) at each batch.

    Raises:
        ValueError: An argument is not valid; or, when a fit starts, there are two of these callbacks, the plugin has a
            scaler of another class, or DeepSpeed scales the loss.
        TooManySkippedStepsError: (in the fit) Steps were skipped ``max_skipped_steps`` times in a row.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_optim.callbacks import LossScaling
        >>> trainer = Trainer(callbacks=[LossScaling(init_scale=1024.0, max_scale=65536.0)], logger=False)
    """

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        min_scale: float | None = 1.0,
        max_scale: float | None = None,
        max_skipped_steps: int | None = MOST_SKIPPED,
        dynamic: bool = True,
        log: bool = False,
    ) -> None:
        self.settings: dict[str, Any] = {
            "init_scale": init_scale,
            "growth_factor": growth_factor,
            "backoff_factor": backoff_factor,
            "growth_interval": growth_interval,
            "min_scale": min_scale,
            "max_scale": max_scale,
            "max_skipped_steps": max_skipped_steps,
            "dynamic": dynamic,
        }
        check_settings(type(self).__name__, self.settings)
        self.logs = check_switch(type(self).__name__, "log", log)
        #: The scaler of this fit, or of the last one.
        self.scaler: LossScaler | None = None
        self._held = HeldSchedules()
        self._replaced: tuple[Any, Any] | None = None  # the plugin, and the scaler that is its own

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the place of the plugin's scaler, before the strategy looks at it."""
        if stage != "fit":
            return
        self._give_back()
        plugin, self.scaler = trainer.precision_plugin, None
        stock: Any = getattr(plugin, "scaler", None)
        cls = self._class_in_place_of(stock, trainer)
        if cls is None:
            return
        self.scaler = cls(stock._device, **self.settings, module=pl_module)
        self.scaler.gradients_may_be_dropped = pl_module.automatic_optimization
        self.scaler.after_step = partial(self._held.after_step, trainer)
        if stock._scale is not None:  # it goes on from an earlier fit, as it would by itself
            self.scaler.load_state_dict(stock.state_dict())
        self._replaced, plugin.scaler = (plugin, stock), self.scaler

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count skipped steps in the order of the Trainer's optimizers."""
        if self._replaced is not None and self.scaler is not None:
            self.scaler.number(trainer.optimizers)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log the scale and the skipped steps, as tensors that nobody has read."""
        if not self.logs or self._replaced is None or self.scaler is None:
            return
        scale = self.scaler._get_scale_async()
        if scale is not None:
            pl_module.log("loss_scale", scale, on_step=True, on_epoch=False)
            pl_module.log("skipped_steps", self.scaler.skipped_steps.float(), on_step=True, on_epoch=False)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """After the fit, save what the plugin's own scaler does not know of."""
        key = type(trainer.precision_plugin).__qualname__
        if self.scaler is not None and key in checkpoint:
            checkpoint[key] = {**checkpoint[key], **self.scaler.state_dict()}

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the plugin its own scaler back."""
        self._give_back()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the plugin its own scaler back."""
        self._give_back()

    def _class_in_place_of(self, stock: Any, trainer: Any) -> type[LossScaler] | None:
        """The class of the scaler that takes the place of the plugin's; None: there is nothing to do."""
        who, cls = type(self).__name__, loss_scaler_like(stock)
        if sum(isinstance(callback, LossScaling) for callback in trainer.callbacks) > 1:
            raise ValueError(f"{who}: the Trainer has two of these callbacks, and one loss; valid: one of them")
        if any("DeepSpeed" in base.__name__ for base in type(trainer.strategy).__mro__):
            raise ValueError(
                f"{who}: DeepSpeed scales the loss itself; valid: without this callback, and with "
                "initial_scale_power, loss_scale_window and min_loss_scale of the strategy"
            )
        if stock is None or (cls is not None and not stock.is_enabled()):
            why = "its float16 gradients cannot be unscaled" if trainer.precision == "16-true" else "it scales no loss"
            warn_once(f"{who} does nothing with precision={trainer.precision!r}: {why}; valid: precision='16-mixed'")
            return None
        if cls is None:
            raise ValueError(
                f"{who}: the precision plugin has a scaler of its own, of class {type(stock).__qualname__}; valid: a "
                "torch.amp.GradScaler, which is replaced, or the plugin's scaler without this callback"
            )
        if own := [f"{name}={value!r}" for name, value in self._of_its_user(stock)]:
            warn_once(f"{who} takes the place of the precision plugin's scaler, whose {', '.join(own)} is not used")
        return cls

    def _of_its_user(self, stock: Any) -> list[tuple[str, float]]:
        """The settings of a scaler that has not been used which its user has chosen, and which are not those here."""
        if stock._scale is not None:
            return []
        found = [(name, getattr(stock, f"_{name}")) for name in _DEFAULTS]
        return [(name, value) for name, value in found if value not in (_DEFAULTS[name], self.settings[name])]

    def _give_back(self) -> None:
        if self._replaced is None or self.scaler is None:
            return
        (plugin, stock), self._replaced = self._replaced, None
        # One of our strategies may have put a view of it there.
        if self.scaler in (plugin.scaler, getattr(plugin.scaler, "scaler", None)):
            plugin.scaler = stock
        self.scaler.give_back(stock)
        self._held.release()
