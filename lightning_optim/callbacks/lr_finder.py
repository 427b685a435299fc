"""Finds a learning rate by a range test, within the fit that uses it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_optim.callbacks.roots import Callback
from lightning_optim.callbacks.trial import Trial
from lightning_optim.checks import check_choice, check_number, check_switch, whole
from lightning_optim.control.lr_finder.find import Report, apply_suggestion, run_sweep
from lightning_optim.control.lr_finder.plot import can_plot
from lightning_optim.control.lr_finder.rates import GroupRates, why_no_range_test
from lightning_optim.control.lr_finder.result import RangeTest
from lightning_optim.control.lr_finder.suggestions import METHODS, Method
from lightning_optim.control.lr_finder.sweep import LRRange, Mode, Sweep
from lightning_optim.warnings import warn_once


class LRFinder(Callback):
    """Find a learning rate by a range test when a fit starts, and train with it.

    At the first batch of an epoch the Trainer's own loop makes ``steps`` optimizer steps, with a learning rate that
    rises from ``min_lr`` to ``max_lr``, over batches of its own. Then the training is put back as it was, bit for bit,
    and goes on with the suggestion: as if the optimizer and its schedules had been made with it. The highest learning
    rate of the param groups is the one that is meant; those of other groups keep their ratio to it. If the curve
    suggests nothing, the reason is a warning, and the learning rate stays.

    Other callbacks, loggers and schedules do not notice. A callback that is a part of what a step does (one that
    changes gradients, say) takes part if it has an attribute ``part_of_steps = True``; its ``state_dict`` is put back.

    Args:
        min_lr: The first learning rate.
        max_lr: The last learning rate.
        steps: How many optimizer steps are made, each of a whole accumulation window.
        apply: Whether to train with the suggestion; False only reports it.
        method: ``"steepest"``, ``"minimum"`` or ``"valley"``: see
            :func:`~lightning_optim.control.lr_finder.suggestions.suggest`.
        mode: ``"exponential"``: equal ratios between the learning rates; ``"linear"``: equal differences.
        at_epochs: The epochs at whose beginning there is a range test, counted from 0.
        smoothing: Decay rate of the moving average of the losses.
        divergence: The test ends early where the loss is so many times the best one: see
            :class:`~lightning_optim.control.lr_finder.sweep.Sweep`. None: it does not.
        folder: Where ``lr_finder.json`` and the picture ``lr_finder.png`` are written, those of later epochs in folders
            ``epoch_1`` and so on within it; None: nowhere.

    Attributes:
        test: The result of the last range test; None: there was none.

    Raises:
        ValueError: An option is out of its range; or (when a fit starts) the training cannot be tested: several
            optimizers, one without a learning rate, DeepSpeed, FSDP 1, recorded steps.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_optim.callbacks import LRFinder
        >>> finder = LRFinder(max_lr=1.0, apply=False)
        >>> trainer = Trainer(callbacks=[finder], logger=False, enable_checkpointing=False)
        >>> finder.suggestion is None
        True

    References:
        Smith, Cyclical Learning Rates for Training Neural Networks, arXiv:1506.01186.
    """

    def __init__(
        self,
        min_lr: float = 1e-7,
        max_lr: float = 10.0,
        steps: int = 100,
        apply: bool = True,
        method: Method = "steepest",
        mode: Mode = "exponential",
        at_epochs: Sequence[int] = (0,),
        smoothing: float = 0.8,
        divergence: float | None = 4.0,
        folder: str | None = None,
    ) -> None:
        self.lr_range = LRRange(min_lr, max_lr, steps, mode, who="LRFinder")
        Sweep(smoothing, divergence, who="LRFinder")
        self.smoothing, self.divergence = smoothing, divergence
        self.apply = check_switch("LRFinder", "apply", apply)
        self.method: Method = check_choice("LRFinder", "method", method, METHODS)
        if isinstance(at_epochs, str) or not at_epochs:
            raise ValueError(f"LRFinder: at_epochs={at_epochs!r}; valid: a list of epochs, such as [0]")
        self.at_epochs = [check_number("LRFinder", "at_epochs", epoch, whole(0)) for epoch in at_epochs]
        self.folder = folder
        self.test: RangeTest | None = None
        self._tested: list[int] = []  # epochs of this fit; a resumed one does not test again what it has applied
        self._trial: Trial | None = None

    @property
    def suggestion(self) -> float | None:
        """The learning rate that the last range test suggests; None: there was no test, or no sound suggestion."""
        return None if self.test is None else self.test.suggestion

    def state_dict(self) -> dict[str, Any]:
        """The tests that were made, as primitives."""
        return {"test": None if self.test is None else self.test.as_dict(), "tested": list(self._tested)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave."""
        saved = state_dict["test"]
        self.test = None if saved is None else RangeTest.from_dict(saved)
        self._tested = list(state_dict["tested"])

    # -- what Lightning calls -----------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin a new fit."""
        if stage == "fit":
            self.test, self._tested = None, []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse trainings that cannot be tested."""
        if (reason := why_no_trial(trainer)) is not None:
            raise ValueError(f"LRFinder: {reason}")
        if self.folder is not None and not can_plot() and trainer.is_global_zero:
            warn_once("LRFinder: matplotlib is not installed: there will be no picture beside lr_finder.json")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Make the range test of an epoch, at its first batch: all that is done at its beginning is done by then."""
        epoch = trainer.current_epoch
        if self._trial is not None or batch_idx != 0 or epoch not in self.at_epochs or epoch in self._tested:
            return
        info = import_module(f"{_root(self)}.utilities.rank_zero").rank_zero_info
        self._tested.append(epoch)
        if trainer.fast_dev_run:
            info("LRFinder: no range test with fast_dev_run")
            return
        self.test = self._range_test(trainer)
        if self.talks:
            info(f"LRFinder, epoch {epoch}: {self.test.table()}")
        if self.folder is not None and trainer.is_global_zero:
            self.test.save(Path(self.folder) if epoch == self.at_epochs[0] else Path(self.folder) / f"epoch_{epoch}")
        if self.apply:
            schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
            apply_suggestion(self.test, trainer.optimizers[0], schedules, "LRFinder")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take note of the losses of a range test."""
        if self._trial is not None:
            self._trial.took(outputs)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if no epoch of ``at_epochs`` has begun."""
        if not self._tested and trainer.is_global_zero:
            warn_once(
                f"LRFinder: no range test was made, as no epoch of at_epochs={self.at_epochs} began in this fit; it "
                f"ended in epoch {trainer.current_epoch}"
            )

    # -- ours ---------------------------------------------------------------------------------------------------

    #: Whether the result is logged, as a line for people.
    talks = True

    def _has_bar(self, trainer: Any) -> bool:
        """Whether there is a bar for the steps of a range test: where the Trainer has one."""
        bar = trainer.progress_bar_callback
        return bar is not None and bar.is_enabled and trainer.is_global_zero

    def _range_test(self, trainer: Any) -> RangeTest:
        sweep = Sweep(self.smoothing, self.divergence)
        rates = GroupRates(trainer.optimizers[0], "LRFinder")
        try:
            with (
                _progress(self._has_bar(trainer), len(self.lr_range)) as report,
                Trial(trainer, self, _root(self)) as trial,
            ):
                self._trial = trial
                run_sweep(self.lr_range, sweep, rates, trial.step, report)
        finally:
            self._trial = None
            rates.put_back()
        return RangeTest.of(sweep, rates.reference, self.lr_range.mode, self.method)


def why_no_trial(trainer: Any) -> str | None:
    """Why a range test of a Trainer's fit cannot be made; None: it can."""
    strategy, optimizers = trainer.strategy, trainer.optimizers
    finders = [type(one).__name__ for one in trainer.callbacks if _is_finder(one)]
    if len(finders) > 1:
        return f"the Trainer has {' and '.join(finders)}; valid: one of them"
    if len(optimizers) != 1:
        return f"{len(optimizers)} optimizers, and a range test is of one learning rate; valid: one optimizer"
    if strategy.handles_gradient_accumulation:
        return f"{type(strategy).__name__}'s engine keeps state that cannot be put back; valid: another strategy"
    if "FSDPStrategy" in (cls.__name__ for cls in type(strategy).__mro__):
        return (
            f"{type(strategy).__name__} replaces weights by views of others while it runs, which cannot be put back; "
            "valid: ModelParallelStrategy, or strategy='in_graph_fsdp2'"
        )
    if getattr(strategy, "capture", False):
        return "capture=True: recorded steps keep the learning rates' places, not their values; valid: capture=False"
    if getattr(getattr(strategy, "options", None), "delay_one_step", False):
        return "delay_one_step=True, where a loss is of older weights; valid: delay_one_step=False"
    return why_no_range_test(optimizers[0])


def _is_finder(callback: Any) -> bool:
    return isinstance(callback, LRFinder) or type(callback).__name__ == "LearningRateFinder"


def _root(callback: Any) -> str:
    """The package of Lightning that a callback's class is for."""
    names = {cls.__module__.partition(".")[0] for cls in type(callback).__mro__}
    return "pytorch_lightning" if "pytorch_lightning" in names else "lightning.pytorch"


@contextmanager
def _progress(has_bar: bool, steps: int) -> Iterator[Report | None]:
    """What is told of the steps of a range test, and shows them by a bar."""
    if not has_bar:
        yield None
        return
    from tqdm.auto import tqdm  # type: ignore[import-untyped] # it comes with Lightning

    with tqdm(total=steps, desc="LRFinder", leave=False, dynamic_ncols=True) as shown:

        def report(step: int, lr: float, loss: float) -> None:
            shown.set_postfix_str(f"lr={lr:.2e}, loss={loss:.3g}", refresh=False)
            shown.update()

        yield report
