"""Clips gradients once for each step, after unscaling; under our strategies a global norm inside of the step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_optim.callbacks.roots import Callback
from lightning_optim.checks import check_switch
from lightning_optim.control.clipping import AGC, AdaGC, Clipped, GradientClipper, NonfiniteGradientError
from lightning_optim.control.clipping.conflicts import fsdp1, optimizer_conflict, settings_conflict


class GradientClipping(Callback):
    """Clip gradients by their global norm, by value, by unit (AGC), or adaptively by tensor (AdaGC).

    It is done once for every step, when the gradients of the whole accumulation window are there and unscaled: in every
    precision, and in manual optimization too, where ``clip_gradients`` of Lightning's module clips scaled gradients.
    Norms are of the whole gradient where FSDP2 divides it. Under our strategies the global norm is clipped inside of
    the step, which needs no pass over the gradients and leaves ``p.grad`` as it is; of SAM's two gradients the last one
    is clipped.

    Args:
        max_norm: Clip the global norm of each optimizer's gradients to this.
        max_value: Clip every element to ``[-max_value, max_value]``.
        agc: Clip each unit by the norm of its weights: see :class:`~lightning_optim.control.clipping.AGC`; a number is
            its ``clip_factor``.
        adagc: Clip each tensor by its own past norms: see :class:`~lightning_optim.control.clipping.AdaGC`; a number is
            its ``ratio``. Its averages are saved in checkpoints.
        error_if_nonfinite: Raise an error that names the parameters whose gradients are infinite or NaN, unless a loss
            scaler is going to skip the step. Every step then waits for the device, and is clipped before it.
        log: Log ``gradient_clipping/norm_before``, ``norm_after`` and ``share`` at every ``log_every_n_steps`` of the
            Trainer (``gradient_clipping/1/...`` for the second of several optimizers): the global norm before and
            after, and the share that was clipped of steps, elements, units or tensors.

    Raises:
        NonfiniteGradientError: (in training, with ``error_if_nonfinite``) Gradients are infinite or NaN.
        ValueError: Not exactly one way is given, an option is out of its range, or (when a fit starts) something in the
            training does not go with it; the message says what to do.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_optim.callbacks import GradientClipping
        >>> trainer = Trainer(callbacks=[GradientClipping(max_norm=1.0)], logger=False, enable_checkpointing=False)
        >>> sum(isinstance(callback, GradientClipping) for callback in trainer.callbacks)
        1
    """

    #: It takes part in range tests of the learning rate: see :class:`~lightning_optim.callbacks.lr_finder.LRFinder`.
    part_of_steps = True

    def __init__(
        self,
        max_norm: float | None = None,
        max_value: float | None = None,
        agc: float | AGC | None = None,
        adagc: float | AdaGC | None = None,
        error_if_nonfinite: bool = False,
        log: bool = False,
    ) -> None:
        self._new_clipper = partial(_Clipper, max_norm, max_value, agc, adagc, error_if_nonfinite)
        clipper = self._new_clipper()
        self.max_norm, self.agc, self.adagc = clipper.max_norm, clipper.agc, clipper.adagc
        self.error_if_nonfinite = clipper.error_if_nonfinite
        self._logs = check_switch("GradientClipping", "log", log)  # Lightning puts a method at `log`
        self._forget()

    def _forget(self) -> None:
        self._clippers: dict[int, GradientClipper] = {}
        self._loaded: dict[int, dict[str, Any]] = {}
        self._last: dict[int, Clipped | None] = {}  # None: the step has the norm
        self._names: Mapping[Tensor, str] = {}
        self._differentiated = False

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies: without the parameters of a training, and methods of its module (``log``)."""
        state = {**self.__dict__, "_names": {}, "_last": {}}
        return {name: value for name, value in state.items() if name not in ("log", "log_dict")}

    @property
    def clips_in_step(self) -> bool:
        """Whether our strategies may clip inside of their steps, because nothing here looks at the gradients."""
        return self.max_norm is not None and not self.error_if_nonfinite

    # -- hooks --------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start anew, and check the Trainer's settings."""
        if stage == "fit":
            self._forget()
            if reason := settings_conflict(trainer, pl_module, self):
                raise ValueError(f"GradientClipping with {reason}")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the optimizers, and know the parameters by name."""
        self._names = {p: name for name, p in pl_module.named_parameters()}
        if self.agc is not None:
            self.agc.excluded(list(self._names.values()))
        for optimizer in trainer.optimizers:
            if reason := optimizer_conflict(trainer, optimizer, self):
                raise ValueError(f"GradientClipping with {reason}")

    def on_train_batch_start(self, *_: Any) -> None:
        """Note that no gradient is of this batch yet."""
        self._differentiated = False

    def on_before_backward(self, *_: Any) -> None:
        """Note that there is a gradient of this batch."""
        self._differentiated = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Clip, or have it done in the step."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # unwraps a LightningOptimizer
        index = next(index for index, one in enumerate(trainer.optimizers) if one is optimizer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and pl_module.automatic_optimization and not self._differentiated:
            return  # training_step returned None: Lightning neither unscales the gradients nor steps
        in_step = getattr(trainer.strategy, "clip_in_step", None)
        if self.clips_in_step and in_step is not None and in_step(optimizer, self.max_norm):
            self._last[index] = None
        elif (sharded := fsdp1(trainer)) is not None:
            self._last[index] = self._clip_fsdp1(sharded)
        else:
            if index not in self._clippers:
                self._clippers[index] = clipper = self._new_clipper()
                if index in self._loaded:
                    clipper.load_state_dict(self._loaded.pop(index))
            measure = self._logs and trainer._logger_connector.should_update_logs
            clipped = self._clippers[index].clip(optimizer, scaler=scaler, names=self._names, measure=measure)
            if clipped is not None:
                self._last[index] = clipped

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log what the last steps clipped, at the steps that are logged."""
        if self._logs and self._last and trainer._logger_connector.should_update_logs:
            for index, optimizer in enumerate(trainer.optimizers):
                if (clipped := self._clipped(trainer, index, optimizer)) is not None:
                    prefix = f"gradient_clipping/{index}" if len(trainer.optimizers) > 1 else "gradient_clipping"
                    pl_module.log_dict({f"{prefix}/{name}": value for name, value in vars(clipped).items()})
            self._last = {}

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let the parameters go."""
        self._names, self._last = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """AdaGC's averages, for each optimizer by its number."""
        states = {index: clipper.state_dict() for index, clipper in self._clippers.items()}
        return {"optimizers": self._loaded | states} if self.adagc is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the averages; a checkpoint of another way of clipping has none."""
        self._clippers = {}
        self._loaded = dict(state_dict.get("optimizers", {})) if self.adagc is not None else {}

    # -- ours ---------------------------------------------------------------------------------------------------

    def _clipped(self, trainer: Any, index: int, optimizer: Any) -> Clipped | None:
        clipped = self._last.get(index)
        if clipped is None and index in self._last:
            norm = trainer.strategy.norm_in_step(optimizer)
            assert self.max_norm is not None  # noqa: S101 # else nothing is left to the step
            clipped = None if norm is None else Clipped.to_norm(norm, self.max_norm)
        return clipped

    def _clip_fsdp1(self, model: Any) -> Clipped:
        """Clip by FSDP1's own method, as only it knows how its flat parameters are divided."""
        norm = model.clip_grad_norm_(self.max_norm)
        if self.error_if_nonfinite and not bool(torch.isfinite(norm)):
            raise NonfiniteGradientError("gradients are infinite or NaN; FSDP1 cannot tell whose")
        assert self.max_norm is not None  # noqa: S101 # others were refused when the fit started
        return Clipped.to_norm(norm, self.max_norm)


class _Clipper(GradientClipper):
    _called = "GradientClipping"
