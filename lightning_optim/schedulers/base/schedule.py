"""What every schedule shares, so that a schedule's own file holds only its formula.

A schedule here is a *closed form*: the learning rate of a group is ``base_lr * factor(t)``, where ``t`` is
``last_epoch`` (the number of ``step()`` calls so far) and nothing else. A run that resumes at any step
therefore goes on with the very bits that the uninterrupted run would have had.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_optim.schedulers.base.group_rates import (
    LoadedRates,
    Rate,
    make_rates_plain,
    plain,
    read_rates,
    write_rates,
)
from lightning_optim.schedulers.base.options import (
    Check,
    check_position,
    check_rates,
    check_ratio,
    check_steps,
    check_total,
    optional,
)
from lightning_optim.schedulers.base.phases import warmup_ramp
from lightning_optim.warnings import warn_once


class Schedule(LRScheduler, ABC):
    """Abstract base of the closed-form schedules: ``lr = base_lr * factor(last_epoch)`` for every group.

    A subclass gives an explicit ``__init__`` and :meth:`factor`. The base resolves fractions of the run,
    keeps or refills the total, and sets the learning rates, also where a group's ``lr`` is a 0-dim tensor
    (written in place, so that compiled and captured steps see the change without recompiling).

    **The total.** ``total_steps=None`` means that the total is filled in later: by a Lightning ``Trainer`` when
    training starts, elsewhere by :meth:`set_total_steps`. Until then the learning rate is that of step 0 if this
    does not depend on the total (no warmup, an int ``warmup_steps``, or a given ``warmup_start``); otherwise it
    stays what the optimizer was given. The first ``step()`` without a total is an error.
    A total that was filled in is not part of the user's configuration, so it is refilled when a
    run resumes: extending ``max_steps`` stretches the schedule. :meth:`load_state_dict` states the rules.

    **Joining a run.** A schedule that is new in a run under way (made for a second ``fit``, or added on
    resume) begins at its step 0, and a total that is filled in is the number of steps that remain. Where its
    optimizer's state is loaded, the learning rate stays the schedule's own, in whatever order this is done.

    **Groups added later** (``optimizer.add_param_group``) join at the next ``step()``; the ``lr`` that they
    came with is their base learning rate.

    **Inside torch's wrappers.** In ``SequentialLR`` a schedule counts from its own milestone. In
    ``ChainedScheduler`` it behaves as ``LambdaLR`` does: being a closed form, it overwrites what the
    schedulers before it in the chain set.

    Args:
        optimizer: The optimizer whose groups are scheduled. Their ``initial_lr``, which an earlier schedule or a
            checkpoint has left there, or else their present ``lr``, is the base (peak) learning rate.
        warmup_steps: Warmup length: an int counts steps, a float in [0, 1) is a fraction of ``total_steps``.
        total_steps: ``step()`` calls in the whole run, warmup included; ``None`` if it will be filled in.
        min_lr_ratio: Final learning rate as a fraction of the base, in [0, 1].
        warmup_start: Factor at step 0 of a warmup, in [0, 1]; ``None`` for ``1 / (warmup_steps + 1)``.
        last_epoch: Index of the last step made; ``-1`` starts afresh.

    Raises:
        TypeError: ``optimizer`` is not a torch optimizer, or an option has the wrong type.
        ValueError: An option is outside its range, or the phases do not fit into ``total_steps``.
    """

    #: The check of each constructor option, by name. A loaded state's options are checked in the same way.
    checks: ClassVar[Mapping[str, Check]] = {
        "warmup_steps": check_steps,
        "total_steps": optional(check_total),
        "min_lr_ratio": check_ratio,
        "warmup_start": optional(check_ratio),
    }

    #: ``last_epoch`` after construction; None once a state has been loaded.
    _joined_at: int | None = None
    #: The number of steps in the whole run for which the total was filled in.
    filled_for: int | None = None

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int | float,
        total_steps: int | None,
        min_lr_ratio: float,
        warmup_start: float | None,
        last_epoch: int,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{type(self).__name__} schedules a torch.optim.Optimizer, not {type(optimizer).__name__}; "
                "wrappers such as LightningOptimizer hold theirs as .optimizer"
            )
        self.warmup_steps = self.checked("warmup_steps", warmup_steps)
        self.total_steps = self.checked("total_steps", total_steps)
        self.min_lr_ratio = self.checked("min_lr_ratio", min_lr_ratio)
        self.warmup_start = self.checked("warmup_start", warmup_start)
        self.total_is_filled = False
        self.awaits_total = False
        self.filled_for = None
        if self.total_steps is not None and (misfit := self._misfit(self.total_steps)):
            raise ValueError(misfit)
        make_rates_plain(optimizer)
        # The base class makes step 0 at once, so every option has to be in place.
        super().__init__(optimizer, last_epoch)
        self._joined_at = self.last_epoch
        LoadedRates.watch(self, optimizer)

    @classmethod
    def checked(cls, name: str, value: Any) -> Any:
        """Check an option of the constructor by its entry in :attr:`checks`, and return what that returns.

        Raises:
            TypeError, ValueError: The value is not valid.
        """
        return cls.checks[name](cls.__name__, name, value)

    @property
    def has_just_joined(self) -> bool:
        """Whether it has made no step, and has loaded no state, since it was constructed."""
        # `last_epoch` is below `_joined_at` while the schedule waits for its turn in a SequentialLR.
        return self._joined_at is not None and self.last_epoch <= self._joined_at

    @abstractmethod
    def factor(self, step: int) -> float:
        """The multiple of the base learning rate at ``step``, for any step of the run and after it.

        Args:
            step: Steps made so far; 0 is the factor of the run's first optimizer step.

        Returns:
            A factor in [0, 1], constant from ``total_steps`` on.

        Raises:
            RuntimeError: ``total_steps`` is not known yet.
        """

    def known_total(self) -> int:
        """``total_steps``, or an error that says how to give it.

        Raises:
            RuntimeError: ``total_steps`` is not known yet.
        """
        if self.total_steps is None:
            raise RuntimeError(
                f"{type(self).__name__} does not know total_steps, the number of its step() calls in the "
                "whole run. Give total_steps=... at construction, or call set_total_steps(n) before the "
                "first step(). A Lightning Trainer fills it in when training starts, if optimization is "
                "automatic and configure_optimizers returned the schedule."
            )
        return self.total_steps

    def set_total_steps(self, total_steps: int, *, filled: bool = False) -> None:
        """Set or change the length of the run; the present learning rates follow at once.

        Fractions (``warmup_steps=0.1``) are resolved anew. The position is kept.

        Args:
            total_steps: ``step()`` calls in the whole run, those already made included.
            filled: The number comes from the trainer's limits rather than from the user. It is then refilled,
                not restored, on resume; and phases that do not fit only warn, because smoke tests shorten
                runs.

        Raises:
            TypeError: ``total_steps`` is not an int.
            ValueError: ``total_steps`` is below 1, or (unless ``filled``) shorter than the phases given in
                steps.

        Example:
            >>> import torch
            >>> from lightning_optim.schedulers import Linear
            >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            >>> schedule = Linear(optimizer, warmup_steps=0.5)
            >>> schedule.set_total_steps(8)
            >>> [schedule.factor(t) for t in range(9)]
            [0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25, 0.0]
        """
        total = check_total(type(self).__name__, "total_steps", total_steps)
        if misfit := self._misfit(total):
            if not filled:
                raise ValueError(misfit)
            warn_once(f"{type(self).__name__}: {misfit}; the run ends before the schedule does")
        self.total_steps = total
        self.total_is_filled = filled
        self.filled_for = None
        self.awaits_total = False
        self._reapply()

    def await_total(self) -> None:
        """Promise that :meth:`set_total_steps` will be called: until then ``step()`` holds the learning rate.

        This is for trainers that search a batch size by trial steps before they know how long the run will be. Without
        the promise, a ``step()`` before the total is known is an error.
        """
        self.awaits_total = self.total_steps is None

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rate of each group as it is now, whoever set it last; tensors are copies."""
        return read_rates(self.optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group at ``last_epoch``.

        Raises:
            RuntimeError: ``total_steps`` is not known, :meth:`await_total` was not called, and this is not the step
                that the constructor makes.
            ValueError: The optimizer has lost groups.
        """
        self._adopt_new_groups()
        unknown = self.total_steps is None and (self._is_initial or self.awaits_total)
        factor = self._first_factor() if unknown else self.factor(self.last_epoch)
        if factor is None:
            return read_rates(self.optimizer)
        return [base_lr * factor for base_lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """The position, the options, and the learning rates in force, as ``rates``; for :meth:`load_state_dict`."""
        passing = ("_joined_at", "awaits_total")
        state = {key: value for key, value in super().state_dict().items() if key not in passing}
        return {**state, "rates": read_rates(self.optimizer)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position, the options, and the learning rates of the optimizer's groups.

        As with torch's own schedulers the saved options win, with a warning that names each one that differs.
        The total is the exception, because a filled one belongs to the run and not to the configuration:

        =========================  ==================  =====================================
        saved total                total held here     total afterwards
        =========================  ==================  =====================================
        given by the user          any                 the saved one
        filled from the trainer    given or filled     the one held here
        filled from the trainer    unknown             the saved one, open to refilling
        unknown                    any                 the one held here
        =========================  ==================  =====================================

        The learning rates become those at saving; if the total differs from that at saving, they become the schedule's
        for the new total. The optimizer's state may be loaded before or after, or not at all.

        Args:
            state_dict: What :meth:`state_dict` returned; tensors and primitives only.

        Raises:
            TypeError: An option, a position or a learning rate has the wrong type.
            ValueError: An option is outside its range, or the optimizer has fewer groups than were scheduled.
        """
        state = {key: value for key, value in state_dict.items() if key not in ("awaits_total", "optimizer", "rates")}
        self._check_state(state)
        rates = check_rates(type(self).__name__, "rates", state_dict.get("rates", self._rates_of_older_state(state)))
        saved_total = state.get("total_steps")
        keep_total = saved_total is None or (state.get("total_is_filled") and self.total_steps is not None)
        if keep_total:
            for key in ("total_steps", "total_is_filled", "filled_for"):
                state.pop(key, None)
        self._warn_about_replaced_options(state)
        super().load_state_dict(state)
        self._joined_at = None
        write_rates(self.optimizer, rates)
        self._adopt_new_groups()
        if self.total_steps is not None:
            self.awaits_total = False  # the state has brought the total
            self._reapply()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or an unpickled schedule, and watch its own optimizer."""
        self.__dict__.update(state)
        LoadedRates.watch(self, self.optimizer)

    def _check_state(self, state: dict[str, Any]) -> None:
        """Check a state's entries and make them plain numbers, in place; an error names the entry that is invalid."""
        name = type(self).__name__
        missing = sorted(self.checks.keys() - state.keys())
        if missing:
            warn_once(
                f"{name}: the state is another schedule's, since it has no {', '.join(missing)}: of it, only the "
                "position and the base learning rates are of use"
            )
        checks: dict[str, Check] = {
            "last_epoch": check_position,
            "base_lrs": check_rates,
            "_last_lr": check_rates,
            **self.checks,
        }
        if methods := sorted(key for key in state if callable(getattr(type(self), key, None))):
            raise ValueError(f"{name}: {', '.join(methods)} cannot be part of a schedule's state")
        for key in checks.keys() & state.keys():
            state[key] = checks[key](name, key, state[key])
        self._check_groups(len(state.get("base_lrs", self.base_lrs)))

    def _rates_of_older_state(self, state: dict[str, Any]) -> list[Rate]:
        """The learning rates at saving, for a state without ``rates``: from the optimizer's state or the schedule's."""
        loaded = LoadedRates.watch(self, self.optimizer).rates
        if self.has_just_joined and loaded is not None:
            return loaded
        active = state.get("last_epoch", -1) >= 0
        return state.get("_last_lr", []) if active else []

    def _misfit(self, total: int) -> str | None:
        """Why the phases given in steps do not fit into ``total``, or ``None``."""
        if isinstance(self.warmup_steps, int) and self.warmup_steps > total:
            return f"warmup_steps={self.warmup_steps} must not exceed total_steps={total}"
        return None

    def _first_factor(self) -> float | None:
        """The factor at step 0 as far as it is known without the total, else ``None``."""
        if self.last_epoch != 0:
            return None
        if self.warmup_steps == 0:
            return 1.0
        if isinstance(self.warmup_steps, int):
            return warmup_ramp(0, self.warmup_steps, self.warmup_start)
        return self.warmup_start

    def _adopt_new_groups(self) -> None:
        """Extend ``base_lrs`` to groups that were added after construction."""
        self._check_groups(len(self.base_lrs))
        added = self.optimizer.param_groups[len(self.base_lrs) :]
        if added:
            added_lrs = [group.setdefault("initial_lr", plain(group["lr"])) for group in added]
            # A new list: an earlier state_dict() holds the old one.
            self.base_lrs = [*self.base_lrs, *map(plain, added_lrs)]

    def _check_groups(self, scheduled: int) -> None:
        groups = len(self.optimizer.param_groups)
        if groups < scheduled:
            raise ValueError(
                f"{type(self).__name__} schedules {scheduled} parameter groups but its optimizer "
                f"has {groups}; build the optimizer with the groups that the checkpoint was saved with"
            )

    def _reapply(self) -> None:
        """Set the learning rates again if they are other than what this schedule last set."""
        # With a negative `last_epoch` it waits for its turn in a SequentialLR. Equal values are not written, because a
        # later member of a ChainedScheduler may have multiplied its own factor onto them. Groups that were added since
        # join at the next step.
        if self.last_epoch >= 0 and self.get_lr()[: len(self._last_lr)] != self._last_lr:
            self._update_lr(self.last_epoch)

    def _warn_about_replaced_options(self, state: dict[str, Any]) -> None:
        names = inspect.signature(type(self)).parameters.keys() & state.keys() - {"last_epoch"}
        if state.get("total_is_filled"):
            names -= {"total_steps"}
        changed = [name for name in sorted(names) if state[name] != getattr(self, name)]
        if changed:
            pairs = [f"{name}={state[name]!r} (not {getattr(self, name)!r})" for name in changed]
            warn_once(
                f"{type(self).__name__}: the checkpoint's options are in force: {', '.join(pairs)}. "
                "To change a resumed schedule, set the attribute, or call set_total_steps, after loading."
            )
