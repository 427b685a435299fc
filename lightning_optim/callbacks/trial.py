"""Steps of a Lightning training that leave no trace: its own loop makes them, and everything is put back.

Lightning's tuners save a checkpoint, run a second fit inside of the first, and load the checkpoint. What is in no
checkpoint (random number generators, attributes, loaders, metrics under way) is then another than before. Here the loop
that makes the training's steps makes the trial's, too, with copies of its counters and loaders, and without what others
would notice; afterwards the originals are back in their places.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from contextlib import ExitStack
from copy import copy, deepcopy
from importlib import import_module
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_optim.control.lr_finder.training_state import TrainingState, loss_of
from lightning_optim.optimizers.sam import stepped

#: Batches without an optimizer step after which manual optimization is taken to make none.
_MOST_BATCHES = 10_000


class Trial:
    """A context in which a Trainer makes steps for a test, at the first batch of an epoch.

    Other callbacks are silent, unless they say by an attribute ``part_of_steps = True`` that they are a part of what a
    step does; the state of those is put back. Loggers, the profiler and schedules stand still. The batches come from
    copies of the loaders, whose datasets are shared.

    Args:
        trainer: The Trainer, in ``on_train_batch_start``.
        callback: The callback that makes the trial: :meth:`took` is to be called in its ``on_train_batch_end``.
        root: Lightning's package.

    Raises:
        TypeError: A loader is an iterator, which cannot be read twice.
    """

    def __init__(self, trainer: Any, callback: Any, root: str) -> None:
        self._trainer, self._callback, self._root = trainer, callback, root
        self._losses: list[Any] = []
        self._undo = ExitStack()
        self._fetcher: Any = None

    def __enter__(self) -> Trial:
        trainer, strategy = self._trainer, self._trainer.strategy
        with ExitStack() as undo:  # undone at once if anything here fails
            self._await_weights()
            loader = _copied(trainer.fit_loop._combined_loader)
            state = TrainingState([trainer.lightning_module], strategy.optimizers, self._extra_tensors)
            undo.callback(state.release)
            undo.callback(self._follow, state)
            self._keep_precision(undo)
            self._silence(undo)
            self._swap_counters(undo)
            self._fetcher = type(trainer.fit_loop._data_fetcher)()
            self._fetcher.setup(loader)
            undo.callback(self._fetcher.teardown)
            iter(self._fetcher)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def took(self, outputs: Any) -> None:
        """Take note of what a batch gave: the ``outputs`` of ``on_train_batch_end``."""
        if (loss := loss_of(outputs)) is not None:
            self._losses.append(loss)

    def step(self) -> torch.Tensor:
        """Make one optimizer step, of a whole accumulation window.

        Returns:
            The mean loss of the window, over all processes.

        Raises:
            ValueError: The module returned no loss, or made no step.
        """
        trainer = self._trainer
        module, loop = trainer.lightning_module, trainer.fit_loop.epoch_loop
        self._losses, before = [], trainer.global_step
        for _ in range(_MOST_BATCHES):
            self._batch()
            if module.automatic_optimization:
                if not loop._should_accumulate():
                    break
            elif trainer.global_step > before:
                break
        else:
            raise ValueError(f"{type(module).__name__} made no optimizer step in {_MOST_BATCHES} batches")
        if not self._losses:
            raise ValueError(
                f"{type(module).__name__}.training_step returned no loss; valid: return the loss, or a dict with 'loss'"
            )
        device = trainer.strategy.root_device
        losses = torch.stack(
            [torch.as_tensor(loss, dtype=torch.float32, device=device).view(()) for loss in self._losses]
        )
        # Lightning has divided each loss of a window by the length of the window; manual losses are the module's own.
        mean = losses.mean() * (trainer.accumulate_grad_batches if module.automatic_optimization else 1)
        return trainer.strategy.reduce(mean, reduce_op="mean")

    # -- ours ---------------------------------------------------------------------------------------------------

    def _batch(self) -> None:
        loop = self._trainer.fit_loop.epoch_loop
        if self._fetcher.done:
            self._rewind(loop)
        try:
            loop.advance(self._fetcher)
        except StopIteration:  # a loader of unknown length has ended, or the module leaves the rest of the epoch out
            self._rewind(loop)
            try:
                loop.advance(self._fetcher)
            except StopIteration:
                module = type(self._trainer.lightning_module).__name__
                raise ValueError(f"the loader is empty, or {module}.on_train_batch_start skips every epoch") from None

    def _rewind(self, loop: Any) -> None:
        loop.batch_progress.reset_on_run()
        iter(self._fetcher)

    def _extra_tensors(self, optimizer: Optimizer) -> Iterable[torch.Tensor]:
        drive = self._drive(optimizer)
        return () if drive is None else drive.extra_tensors()

    def _drive(self, optimizer: Optimizer) -> Any:
        """What steps an optimizer under our strategies; None under others."""
        drive_of = getattr(self._trainer.strategy, "_drive", None)
        return None if drive_of is None else drive_of(optimizer)

    def _follow(self, state: TrainingState) -> None:
        """Put the training's state back, and have our strategies follow it."""
        with ExitStack() as then:  # the last one first, whatever becomes of the others
            then.callback(state.put_gradients_back)
            for optimizer in self._trainer.strategy.optimizers:
                if (drive := self._drive(optimizer)) is not None:
                    then.callback(drive.undone, stepped(optimizer))
            then.callback(state.put_back)
            then.callback(self._await_weights)
            for optimizer in self._trainer.strategy.optimizers:
                optimizer.zero_grad()

    def _await_weights(self) -> None:
        """Wait for the weights of the last step, which some of our strategies bring to the device later."""
        if (publish := getattr(self._trainer.strategy, "_publish", None)) is not None:
            publish()

    def _keep_precision(self, undo: ExitStack) -> None:
        plugin = self._trainer.precision_plugin
        undo.callback(plugin.load_state_dict, deepcopy(plugin.state_dict()))
        for optimizer in self._trainer.strategy.optimizers:
            if (backward := getattr(self._drive(optimizer), "backward", None)) is not None:
                for name in ("_previous", "_expected"):  # the norm of the last step, and how often gradients come
                    undo.callback(setattr, backward, name, getattr(backward, name))

    def _silence(self, undo: ExitStack) -> None:
        trainer = self._trainer
        dummy = import_module(f"{self._root}.loggers.logger").DummyLogger
        profiler = import_module(f"{self._root}.profilers").PassThroughProfiler
        parts = [callback for callback in trainer.callbacks if getattr(callback, "part_of_steps", False)]
        for callback in parts:
            undo.callback(callback.load_state_dict, deepcopy(callback.state_dict()))
        order = [callback for callback in trainer.callbacks if callback in parts or callback is self._callback]
        _swap(undo, trainer, "callbacks", order)
        _swap(undo, trainer, "loggers", [dummy() for _ in trainer.loggers])
        _swap(undo, trainer, "profiler", profiler())
        _swap(undo, trainer, "should_stop", False)
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        if trainer.lightning_module.automatic_optimization:
            _swap(undo, trainer.strategy, "lr_scheduler_configs", [])
        else:  # the module steps them itself
            for schedule in schedules:
                schedule.step = _nothing
                undo.callback(delattr, schedule, "step")

    def _swap_counters(self, undo: ExitStack) -> None:
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        connector = trainer._logger_connector
        kept = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(connector).items()}
        undo.callback(vars(connector).update, kept)
        results = type(loop._results)(training=True)
        for owner, name in (
            (loop, "batch_progress"),
            (loop, "scheduler_progress"),
            (loop.automatic_optimization, "optim_progress"),
            (loop.manual_optimization, "optim_step_progress"),
        ):
            _swap(undo, owner, name, deepcopy(getattr(owner, name)))
        _swap(undo, loop, "_results", results)
        _swap(undo, loop, "_restarting", False)
        _swap(undo, loop, "_batches_that_stepped", loop._batches_that_stepped)
        _swap(undo, loop.manual_optimization, "_output", {})
        loop.batch_progress.reset_on_run()


def _swap(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _nothing(*_: Any, **__: Any) -> None:
    """Stand for the ``step`` of a schedule."""


def _copied(loader: Any) -> Any:
    """A copy of Lightning's combined loader, whose position is its own."""
    combined = copy(loader)
    combined._iterator = None
    combined.flattened = [_copied_loader(one) for one in loader.flattened]
    return combined


def _copied_loader(loader: Any) -> Any:
    data = loader.dataset if isinstance(loader, DataLoader) else loader
    if callable(getattr(data, "__next__", None)) and iter(data) is data:
        raise TypeError(
            f"LRFinder: the training data is a {type(data).__name__}, an iterator, which a range test would use up; "
            "valid: a DataLoader, or any iterable that begins anew with each iter()"
        )
    if not isinstance(loader, DataLoader):
        return _with_own_generators(loader)
    fresh = copy(loader)
    fresh._iterator = None  # workers that persist belong to the original
    shared = [loader.collate_fn, loader.worker_init_fn, loader.multiprocessing_context]
    memo = {id(one): one for one in shared if one is not None}
    memo[id(data)] = _with_own_generators(data)
    try:
        return deepcopy(fresh, memo)  # of the samplers and their generators; the data is shared
    except TypeError as error:
        raise TypeError(
            f"LRFinder: a {type(loader.sampler).__name__} cannot be copied for the range test ({error}); valid: "
            "samplers that can be"
        ) from error


def _with_own_generators(data: Any) -> Any:
    """A copy of a dataset with the same contents, and generators of random numbers of its own."""
    own = copy(data)
    for name, value in getattr(own, "__dict__", {}).items():
        if isinstance(value, torch.Generator | random.Random) or type(value).__module__.startswith("numpy.random"):
            vars(own)[name] = deepcopy(value)
        elif isinstance(value, Dataset):
            vars(own)[name] = _with_own_generators(value)
    return own
