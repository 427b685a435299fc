"""What every schedule shares, so that a schedule's own file holds only its formula.

A schedule here is a *closed form*: the learning rate of a group is ``base_lr * factor(t)``, where ``t`` is
``last_epoch`` (the number of ``step()`` calls so far) and nothing else. A run that resumes at any step
therefore goes on with the very bits that the uninterrupted run would have had.
"""

from __future__ import annotations

import inspect
import numbers
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_optim.warnings import warn_once


def warmup_ramp(step: int, warmup_steps: int, warmup_start: float | None) -> float:
    """Linear rise of the factor during the warmup, ``step < warmup_steps``.

    Args:
        step: Steps made so far.
        warmup_steps: Steps that the warmup takes.
        warmup_start: The factor at step 0. ``None`` starts one increment above zero, ``1 / (warmup_steps +
            1)``.

    Returns:
        The factor; the ramp would reach 1 at ``step == warmup_steps``.

    Example:
        >>> [warmup_ramp(t, 4, None) for t in range(4)]
        [0.2, 0.4, 0.6, 0.8]
        >>> [warmup_ramp(t, 4, 0.0) for t in range(4)]
        [0.0, 0.25, 0.5, 0.75]
    """
    if warmup_start is None:
        return (step + 1) / (warmup_steps + 1)
    return warmup_start + (1 - warmup_start) * (step / warmup_steps)


def fraction_done(step: int, begin: int, end: int) -> float:
    """How much of the phase ``begin..end`` has passed, held at 1 after it.

    Example:
        >>> [fraction_done(t, 10, 14) for t in (10, 11, 14, 99)]
        [0.0, 0.25, 1.0, 1.0]
        >>> fraction_done(10, 10, 10)  # a phase without steps is over, not 0/0
        1.0
    """
    return 1.0 if step >= end else (step - begin) / (end - begin)


def above_floor(shape: float, min_lr_ratio: float) -> float:
    """Squeeze a shape that falls from 1 to 0 so that it falls from 1 to ``min_lr_ratio``, exact at both ends.

    Example:
        >>> above_floor(1.0, 0.1), above_floor(0.5, 0.1), above_floor(0.0, 0.1)
        (1.0, 0.55, 0.1)
    """
    return shape + min_lr_ratio * (1 - shape)


def steps_in(amount: int | float, total_steps: int) -> int:
    """Resolve an amount to steps: an int is a count, a float a fraction of ``total_steps``.

    Example:
        >>> steps_in(100, 2000), steps_in(0.07, 100)
        (100, 7)
    """
    return amount if isinstance(amount, int) else round(amount * total_steps)


def check_steps(name: str, value: int | float) -> int | float:
    """Validate an amount that is a count (int >= 0) or a fraction of the run (float in [0, 1)).

    Returns:
        A plain ``int`` or ``float``, so that NumPy scalars cannot reach a checkpoint.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` is a negative count, or a float outside [0, 1).
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} must be an int (steps) or a float in [0, 1) (fraction of total_steps)")
    if isinstance(value, numbers.Integral):
        if value < 0:
            raise ValueError(f"{name}={value} must be 0 or more steps, or a float in [0, 1)")
        return int(value)
    value = float(value)
    if not 0 <= value < 1:
        hint = f"{int(value)} for {int(value)} steps" if value >= 1 and value.is_integer() else "e.g. 100"
        raise ValueError(
            f"{name}={value} is neither a count nor a fraction: give an int ({hint}), "
            f"or a float in [0, 1) for that fraction of total_steps (e.g. 0.1)"
        )
    return value


def check_ratio(name: str, value: float) -> float:
    """Validate a ratio in [0, 1] and return it as a plain ``float``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} must be a float in [0, 1]")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must be in [0, 1]")
    return float(value)


def check_total(value: int) -> int:
    """Validate ``total_steps`` and return it as a plain ``int``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"total_steps={value!r} must be an int: the number of step() calls in the whole run")
    if value < 1:
        raise ValueError(f"total_steps={value} must be at least 1")
    return int(value)


class Schedule(LRScheduler, ABC):
    """Abstract base of the closed-form schedules: ``lr = base_lr * factor(last_epoch)`` for every group.

    A subclass gives an explicit ``__init__`` and :meth:`factor`. The base resolves fractions of the run,
    keeps or refills the total, and sets the learning rates, also where a group's ``lr`` is a 0-dim tensor
    (written in place, so that compiled and captured steps see the change without recompiling).

    **The total.** ``total_steps=None`` means that somebody else knows it: under a Lightning ``Trainer`` it is
    filled in when training starts, elsewhere call :meth:`set_total_steps`. Until then the learning rate is
    that of step 0 wherever this does not depend on the total (no warmup, an int ``warmup_steps``, or a given
    ``warmup_start``), and stays what the optimizer was given otherwise; the first ``step()`` without a total
    is an error. A total that was filled in is not part of the user's configuration, so it is refilled when a
    run resumes: extending ``max_steps`` stretches the schedule. :meth:`load_state_dict` states the rules.

    **Groups added later** (``optimizer.add_param_group``) join at the next ``step()``; the ``lr`` that they
    came with is their base learning rate.

    **Inside torch's wrappers.** In ``SequentialLR`` a schedule counts from its own milestone. In
    ``ChainedScheduler`` it behaves as ``LambdaLR`` does: being a closed form, it overwrites what the
    schedulers before it in the chain set.

    Args:
        optimizer: The optimizer whose groups are scheduled; their present ``lr`` is the base (peak) learning
            rate.
        warmup_steps: Warmup length: an int counts steps, a float in [0, 1) is a fraction of ``total_steps``.
        total_steps: ``step()`` calls in the whole run, warmup included; ``None`` if it will be filled in.
        min_lr_ratio: Final learning rate as a fraction of the base, in [0, 1].
        warmup_start: Factor at step 0 of a warmup, in [0, 1]; ``None`` for ``1 / (warmup_steps + 1)``.
        last_epoch: Index of the last step made; ``-1`` starts afresh.

    Raises:
        TypeError: ``optimizer`` is not a torch optimizer, or an option has the wrong type.
        ValueError: An option is outside its range, or the phases do not fit into ``total_steps``.
    """

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
        self.warmup_steps = check_steps("warmup_steps", warmup_steps)
        self.total_steps = None if total_steps is None else check_total(total_steps)
        self.min_lr_ratio = check_ratio("min_lr_ratio", min_lr_ratio)
        self.warmup_start = None if warmup_start is None else check_ratio("warmup_start", warmup_start)
        self.total_is_filled = False
        self.awaits_total = False
        if self.total_steps is not None and (misfit := self._misfit(self.total_steps)):
            raise ValueError(misfit)
        # The base class makes step 0 at once, so every option has to be in place.
        super().__init__(optimizer, last_epoch)

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
        total = check_total(total_steps)
        if misfit := self._misfit(total):
            if not filled:
                raise ValueError(misfit)
            warn_once(f"{type(self).__name__}: {misfit}; the run ends before the schedule does")
        self.total_steps = total
        self.total_is_filled = filled
        self.awaits_total = False
        self._reapply()

    def await_total(self) -> None:
        """Promise that :meth:`set_total_steps` will be called: until then ``step()`` holds the learning rate.

        For trainers that search a batch size by trial steps before they know how long the run will be. Without the
        promise, a ``step()`` before the total is known is an error.
        """
        self.awaits_total = self.total_steps is None

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group at ``last_epoch``.

        Raises:
            RuntimeError: ``total_steps`` is not known, and this is neither the step that construction makes nor
                after :meth:`await_total`.
            ValueError: The optimizer has lost groups.
        """
        self._adopt_new_groups()
        unknown = self.total_steps is None and (self._is_initial or self.awaits_total)
        factor = self._first_factor() if unknown else self.factor(self.last_epoch)
        if factor is None:
            return [_copy(group["lr"]) for group in self.optimizer.param_groups]
        return [base_lr * factor for base_lr in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position and the options.

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

        If the total is then another than at saving, the learning rates are set for it at once, so load the
        optimizer's state first (Lightning and Accelerate do).

        Args:
            state_dict: What :meth:`state_dict` returned; tensors and primitives only.
        """
        state = {key: value for key, value in state_dict.items() if key != "awaits_total"}
        saved_total = state.get("total_steps")
        keep_total = saved_total is None or (state.get("total_is_filled") and self.total_steps is not None)
        if keep_total:
            state.pop("total_steps", None)
            state.pop("total_is_filled", None)
        self._warn_about_replaced_options(state)
        super().load_state_dict(state)
        if self.total_steps is not None:
            self.awaits_total = False  # it has come with the state
            self._reapply()

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
        groups = self.optimizer.param_groups
        if len(groups) < len(self.base_lrs):
            raise ValueError(
                f"{type(self).__name__} schedules {len(self.base_lrs)} parameter groups but its optimizer "
                f"has {len(groups)}; build the optimizer with the groups that the checkpoint was saved with"
            )
        added = groups[len(self.base_lrs) :]
        if added:
            added_lrs = [group.setdefault("initial_lr", _copy(group["lr"])) for group in added]
            # A new list: an earlier state_dict() holds the old one.
            self.base_lrs = [*self.base_lrs, *map(_copy, added_lrs)]

    def _reapply(self) -> None:
        """Set the learning rates again if they are other than what this schedule last set."""
        # Below zero it waits for its turn in a SequentialLR. Equal values are not written, because a later
        # member of a ChainedScheduler may have multiplied its own factor onto them.
        if self.last_epoch >= 0 and self.get_lr() != self._last_lr:
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


def _copy(lr: float | Tensor) -> float | Tensor:
    return lr.clone() if isinstance(lr, torch.Tensor) else lr
