"""The logic of the detached strategies, for either root of Lightning, based on :mod:`lightning_optim.offload`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.control.rollback.policy import UndoPolicy
from lightning_optim.offload import Detached, DetachedOptions
from lightning_optim.offload.checkpoint import checked_masters, gathered_masters, gathered_state, own_entries
from lightning_optim.offload.options import Clip, Wait
from lightning_optim.offload.replicas import Replicas
from lightning_optim.optimizers.sam import stepped
from lightning_optim.stepping.evaluations import request_of
from lightning_optim.strategies.detached_drive import DetachedDrive
from lightning_optim.strategies.drive import Drive
from lightning_optim.strategies.driven import Driven, OnOneDevice, Sharded
from lightning_optim.strategies.replicated import Replicated
from lightning_optim.warnings import warn_once

#: The key in a checkpoint for masters that have more bits than their weights.
MASTERS = "detached_masters"

#: Hooks at the ends of epochs and trainings, which Lightning calls before it tells the strategy of the end.
END_HOOKS = ("on_train_epoch_start", "on_train_epoch_end", "on_train_end")

#: Words in the names of Lightning's own callbacks that look at weights, or call what their user gives them.
LOOKERS = ("Averag", "Lambda", "Pruning")


class DetachedBase(Driven):
    """Steps optimizers from masters in host memory.

    Args:
        *args: Arguments of the Lightning strategy.
        options: See :class:`~lightning_optim.offload.options.DetachedOptions`.
        **kwargs: Arguments of the Lightning strategy, and ``undo``.

    Raises:
        ValueError: An option is not valid.
    """

    #: Whether gradients are final as soon as the backward pass has accumulated them.
    gradients_are_local = False

    def __init__(self, *args: Any, options: DetachedOptions, **kwargs: Any) -> None:
        super().__init__(*args, engine=options.engine, **kwargs)
        self.options = options
        self._ended: WeakKeyDictionary[Optimizer, Detached] | None = None  # of the last training, for saving it

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and other processes: without pipelines, which have threads and hooks, or a window."""
        return {**super().__getstate__(), "_drives": None, "_ended": None, "_window": None}

    # -- what Lightning calls -----------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state in the usual format, gathered from all processes that have some of it."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # unwraps a LightningOptimizer
        detached = self._detached_of(optimizer)
        if detached is not None:
            detached.publish()
            if detached.replicas is not None:
                return gathered_state(detached, optimizer)
        return super().optimizer_state(optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load states for the masters, and the masters if the checkpoint has some.

        Raises:
            ValueError: The masters do not fit the parameters; this is checked before anything is loaded.
        """
        by_name = dict(self.lightning_module.named_parameters())
        saved = checked_masters(checkpoint[MASTERS], by_name, len(self.optimizers)) if MASTERS in checkpoint else []
        if not self._loads_with_the_model:
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                detached = self._detached_of(optimizer)
                if detached is None:
                    optimizer.load_state_dict(state)
                    continue
                detached.read_weights()
                with detached.masters_in_place():
                    optimizer.load_state_dict(own_entries(detached, optimizer, state))
        for optimizer, masters in zip(self.optimizers, saved, strict=False):
            self._load_masters(optimizer, masters, by_name)

    def on_train_start(self) -> None:
        """Set masters to the weights that were loaded, of which version counters do not always tell."""
        for optimizer in self.optimizers:
            if (detached := self._detached_of(optimizer)) is not None:
                detached.read_weights()
        super().on_train_start()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save the checkpoint, with the masters that have more bits than their weights."""
        found = [self._detached_of(optimizer) for optimizer in self.optimizers]
        if "optimizer_states" in checkpoint and any(found):
            names = {p: name for name, p in self.lightning_module.named_parameters()}
            checkpoint[MASTERS] = [{} if detached is None else gathered_masters(detached, names) for detached in found]
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights after the last step."""
        self._publish()
        return super().lightning_module_state_dict()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch, with the weights after the last step."""
        if self.options.wait == "forward":
            for optimizer in self.optimizers:
                if (detached := self._detached_of(optimizer)) is not None:
                    detached.await_uncalled()
        return super().training_step(*args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step, and wait for the weights if somebody looks at them before the next batch."""
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self.options.wait == "forward" and self._weights_are_seen():
            self._publish()
        return output

    def on_validation_start(self) -> None:
        """Wait until the weights are those after the last step."""
        self._publish()
        super().on_validation_start()

    def on_train_end(self) -> None:
        """Wait until the weights are those after the last step."""
        self._publish()
        super().on_train_end()

    # -- ours ---------------------------------------------------------------------------------------------------

    #: Whether the Lightning strategy loads optimizers together with the model.
    _loads_with_the_model = False

    def _new_drive(self, optimizer: Optimizer) -> Drive:
        if request_of(optimizer) == "loss_and_gradient":
            return Drive(optimizer, self.engine)  # it steps weights that it keeps in host memory itself
        return self._detach(optimizer)

    def _detach(self, optimizer: Optimizer) -> DetachedDrive:
        drive = DetachedDrive(optimizer, self.options.engine, self._expectation)
        drive.attach(optimizer, self._detached(optimizer))
        return drive

    def _detached(self, optimizer: Optimizer) -> Detached:
        module = self.lightning_module if self.options.wait == "forward" else None
        return Detached(optimizer, self.options, replicas=self._replicas(), overlap=self._overlaps(), module=module)

    def _check_clip(self, trainer: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if self.options.clip == "none" and (trainer.gradient_clip_val or scaler is not None):
            what = (
                f"gradient_clip_val={trainer.gradient_clip_val}"
                if trainer.gradient_clip_val
                else f"precision={trainer.precision!r}"
            )
            raise ValueError(f"clip='none' with {what}; valid: clip='exact' or clip='speculative'")

    def _take_over(self, optimizer: Optimizer, trainer: Any) -> None:
        self._check_clip(trainer)
        self._drive(optimizer)
        clip = self.options.clip
        if clip != "exact" and not self._overlaps():
            warn_once(
                f"{self.strategy_name}: clip={clip!r} is of no use here: something looks at the gradients before the "
                "step, or the module steps by itself; updates run in the step, as with clip='exact'"
            )

    def _detached_of(self, optimizer: Optimizer) -> Detached | None:
        optimizer = stepped(optimizer)
        drive = None if self._drives is None else self._drives.get(optimizer)
        if isinstance(drive, DetachedDrive):
            return drive.detached
        return None if self._ended is None else self._ended.get(optimizer)

    def _release(self) -> None:
        drives = {o: drive for o, drive in (self._drives or {}).items() if isinstance(drive, DetachedDrive)}
        ended = {o: drive.detached for o, drive in drives.items() if drive.detached is not None}
        self._ended = WeakKeyDictionary(ended) if ended else None
        super()._release()

    def _publish(self) -> None:
        for optimizer in self.optimizers:
            if (detached := self._detached_of(optimizer)) is not None:
                detached.publish()

    def _replicas(self) -> Replicas | None:
        """The processes among which masters are divided."""
        return None

    def _overlaps(self) -> bool:
        """Whether gradients may leave their places before the step, because nobody looks for them there."""
        trainer, module = self._trainer, self.lightning_module
        hooks = ("on_after_backward", "on_before_zero_grad")
        return (
            self.gradients_are_local
            and module.automatic_optimization
            and not any(map(request_of, self.optimizers))
            and not self._gradients_are_seen()
            and self._is_stock(module, "optimizer_zero_grad")
            and self._is_stock(module, "backward")
            and all(self._is_stock(module, hook) for hook in hooks)
            and all(self._is_stock(callback, hook, "Callback") for hook in hooks for callback in trainer.callbacks)
        )

    def _weights_are_seen(self) -> bool:
        """Whether a hook between a step and the next batch may look at the weights, or change them."""
        # Hooks at the ends of epochs and trainings are included: only after a step may it turn out to be the last one.
        hooks = ("on_train_batch_end", "on_train_batch_start", "on_validation_start", *END_HOOKS)
        transfers = ("on_before_batch_transfer", "on_after_batch_transfer")
        trainer, module = self._trainer, self.lightning_module
        others = [
            callback
            for callback in trainer.callbacks
            if not type(callback).__module__.startswith((self.root, "lightning_optim"))
            or any(word in type(callback).__name__ for word in LOOKERS)
        ]
        return (
            not module.automatic_optimization
            or not all(self._is_stock(module, hook) for hook in (*hooks, *transfers))
            or not all(self._is_stock(callback, hook, "Callback") for hook in hooks for callback in others)
        )

    def _expectation(self) -> tuple[float | None, float | None]:
        """What the next step is expected to be given: the loss scale, and the limit of the norm."""
        scaler = getattr(self.precision_plugin, "scaler", None)
        if self.options.clip == "exact":
            return None, None
        return (scaler.get_scale() if scaler is not None else None), self._max_norm

    def _load_masters(self, optimizer: Optimizer, masters: Mapping[str, Tensor], by_name: Mapping[str, Tensor]) -> None:
        detached = self._detached_of(optimizer)
        if not masters:
            return
        if detached is None:
            warn_once(
                f"{self.strategy_name}: the checkpoint's masters, which have more bits than its weights, are not used: "
                "the step is where the weights are"
            )
            return
        if unknown := [name for name in masters if name not in by_name]:
            warn_once(
                f"{self.strategy_name}: the checkpoint has masters of {', '.join(unknown)}, and the module has no such "
                "parameters: they are not used"
            )
        strange = detached.set_masters({by_name[name]: value for name, value in masters.items() if name in by_name})
        if strange:
            warn_once(
                f"{self.strategy_name}: the checkpoint's masters of {len(strange)} parameters are not those of its "
                "weights, which have changed since: the weights are taken"
            )


class DetachedOnOneDevice(OnOneDevice, DetachedBase):
    """:class:`DetachedBase` on the one device that the Trainer is given."""

    gradients_are_local = True

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        accelerator: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        master_dtype: str = "float32",
        clip: Clip = "exact",
        bucket_mb: float = 32.0,
        device_fraction: float = 0.0,
        delay_one_step: bool = False,
        engine: str = "auto",
        wait: Wait = "step",
        undo: bool | dict[str, Any] | UndoPolicy = False,
    ) -> None:
        options = DetachedOptions(master_dtype, clip, bucket_mb, device_fraction, delay_one_step, engine, wait)
        super().__init__(
            device,
            accelerator=accelerator,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            options=options,
            undo=undo,
        )


class DetachedReplicas(Replicated, DetachedBase):
    """:class:`DetachedBase` with masters and state divided over the processes of DDP."""

    def __init__(
        self,
        *args: Any,
        master_dtype: str = "float32",
        bucket_mb: float = 32.0,
        device_fraction: float = 0.0,
        engine: str = "auto",
        undo: bool | dict[str, Any] | UndoPolicy = False,
        **kwargs: Any,
    ) -> None:
        options = DetachedOptions(master_dtype, "exact", bucket_mb, device_fraction, False, engine)
        super().__init__(*args, options=options, undo=undo, **kwargs)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Refuse parameters that DDP was told to leave to each process: here all processes have the same weights."""
        if self._unreduced is not None and (names := self._unreduced.ignored(self.optimizers)):
            raise ValueError(
                f"{self.strategy_name}: DDP was told to leave the gradients of {', '.join(names)} to each process "
                "(_ddp_params_and_buffers_to_ignore), and one process steps each weight for all; valid: "
                "strategy='in_graph_ddp', or gradients that DDP reduces"
            )
        super().pre_backward(closure_loss)

    def _replicas(self) -> Replicas | None:
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        return Replicas() if ready and torch.distributed.get_world_size() > 1 else None


class DetachedSharded(Sharded, DetachedBase):
    """:class:`DetachedBase` over sharded parameters, whose masters are divided as they are."""

    _loads_with_the_model = True

    def __init__(
        self,
        data_parallel_size: Any = "auto",
        tensor_parallel_size: int = 1,
        *,
        master_dtype: str = "float32",
        bucket_mb: float = 32.0,
        device_fraction: float = 0.0,
        engine: str = "auto",
        undo: bool | dict[str, Any] | UndoPolicy = False,
        **kwargs: Any,
    ) -> None:
        options = DetachedOptions(master_dtype, "exact", bucket_mb, device_fraction, False, engine)
        super().__init__(data_parallel_size, tensor_parallel_size, options=options, undo=undo, **kwargs)
