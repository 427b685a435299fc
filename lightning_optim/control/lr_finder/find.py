"""A range test of a plain training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_optim.checks import check_choice, check_switch
from lightning_optim.control.lr_finder.rates import GroupRates, apply_lr
from lightning_optim.control.lr_finder.result import RangeTest
from lightning_optim.control.lr_finder.suggestions import METHODS, Method
from lightning_optim.control.lr_finder.sweep import LRRange, Mode, Sweep
from lightning_optim.control.lr_finder.training_state import TrainingState, loss_of
from lightning_optim.warnings import warn_once

#: Told of each point: the number of the step from 0, the learning rate, and the loss.
Report = Callable[[int, float, float], Any]


def find_lr(
    optimizer: Optimizer,
    step: Callable[[], Any],
    *,
    modules: Iterable[nn.Module],
    min_lr: float = 1e-7,
    max_lr: float = 10.0,
    steps: int = 100,
    mode: Mode = "exponential",
    method: Method = "steepest",
    smoothing: float = 0.8,
    divergence: float | None = 4.0,
    apply: bool = False,
    schedules: Iterable[object] = (),
    stateful: Iterable[Any] = (),
    report: Report | None = None,
) -> RangeTest:
    """Raise the learning rate step by step, see what becomes of the loss, and put everything back.

    Weights, buffers and attributes of the modules, gradients, the optimizer's state and learning rates, and the random
    number generators are what they were, bit for bit, also if ``step`` raises an error. What else ``step`` moves is the
    caller's: give it an iterator of its own over the data, and do not step schedules in it.

    Args:
        optimizer: The optimizer. Its highest learning rate is the one that rises; those of other groups keep their
            ratio to it.
        step: Makes one optimizer step, on new data, and returns the loss before it, the same on all ranks.
        modules: The modules that it trains, and others that change with them.
        min_lr: The first learning rate.
        max_lr: The last learning rate.
        steps: How many steps are made.
        mode: ``"exponential"`` or ``"linear"``: see :class:`~lightning_optim.control.lr_finder.sweep.LRRange`.
        method: Whose suggestion is the result's :attr:`~RangeTest.suggestion`: see
            :func:`~lightning_optim.control.lr_finder.suggestions.suggest`.
        smoothing: Decay rate of the moving average of the losses.
        divergence: The test ends early where the loss is so many times the best one: see
            :class:`~lightning_optim.control.lr_finder.sweep.Sweep`. None: it does not.
        apply: Whether to train on with the suggestion, if there is one.
        schedules: The optimizer's schedules, which go on from a learning rate that is applied.
        stateful: Other things that ``step`` changes and that have a ``state_dict`` and a ``load_state_dict``, such as a
            loss scaler: their state is put back.
        report: Called after each step.

    Raises:
        TypeError: ``step`` returned no loss.
        ValueError: An option is out of its range, or a range test of the optimizer would say nothing.

    Example:
        >>> import torch
        >>> noise = torch.manual_seed(0)
        >>> model = nn.Linear(8, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def step():
        ...     x = torch.randn(64, 8)
        ...     loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss
        >>> test = find_lr(optimizer, step, modules=[model], apply=True)
        >>> 0.01 < test.suggestion < 1
        True
        >>> optimizer.param_groups[0]["lr"] == test.suggestion
        True

    References:
        Smith, Cyclical Learning Rates for Training Neural Networks, arXiv:1506.01186.
    """
    lr_range = LRRange(min_lr, max_lr, steps, mode, who="find_lr")
    sweep = Sweep(smoothing, divergence, who="find_lr")
    check_choice("find_lr", "method", method, METHODS)
    check_switch("find_lr", "apply", apply)
    rates = GroupRates(optimizer, "find_lr")
    with ExitStack() as then:  # the last one first, whatever becomes of the others
        state = TrainingState(modules, [optimizer])
        then.callback(state.release)
        then.callback(state.put_back)
        then.callback(rates.put_back)
        for one in stateful:
            then.callback(one.load_state_dict, deepcopy(one.state_dict()))
        run_sweep(lr_range, sweep, rates, step, report)
    test = RangeTest.of(sweep, rates.reference, mode, method)
    if apply:
        apply_suggestion(test, optimizer, schedules, "find_lr")
    return test


def run_sweep(
    lr_range: LRRange, sweep: Sweep, rates: GroupRates, step: Callable[[], Any], report: Report | None = None
) -> None:
    """Make the steps of a range test; nothing is put back.

    Args:
        lr_range: The learning rates.
        sweep: Gets the losses.
        rates: Sets the learning rates.
        step: See :func:`find_lr`.
        report: See :func:`find_lr`.

    Raises:
        TypeError: ``step`` returned no loss.
    """
    for number, lr in enumerate(lr_range):
        rates.set(lr)
        loss = loss_of(step())
        if loss is None:
            raise TypeError("a step of the range test returned no loss; valid: a number, or a tensor with one")
        value = float(loss)
        goes_on = sweep.add(lr, value)
        if report is not None:
            report(number, lr, value)
        if not goes_on:
            return


def apply_suggestion(test: RangeTest, optimizer: Optimizer, schedules: Iterable[object], who: str) -> None:
    """Train on with the suggestion of a range test; if there is none, warn, and leave the learning rates.

    Args:
        test: The range test.
        optimizer: The optimizer.
        schedules: Its schedules.
        who: Who asks, for the warning.
    """
    if test.suggestion is None:
        others = {name: found.lr for name, found in test.suggestions.items() if found.lr is not None}
        hint = f" (other methods suggest: {others})" if others else ""
        warn_once(f"{who}: no learning rate is suggested, and it stays at {test.reference:g}: {test.reason}{hint}")
    else:
        apply_lr(optimizer, test.suggestion, test.reference, schedules)
