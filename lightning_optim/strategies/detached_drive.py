"""Stepping one optimizer from masters in host memory, in place of its own ``step``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.offload import Detached
from lightning_optim.stepping.steps import Steps
from lightning_optim.strategies.drive import AMP, REPLACED, Drive, set_attribute


class DetachedDrive(Drive):
    """One optimizer under a detached strategy.

    Args:
        optimizer: The optimizer.
        engine: See :class:`Drive`.
        expects: Returns what the next step will be given: see :class:`~lightning_optim.offload.Detached`.

    Attributes:
        detached: What steps the optimizer once :meth:`attach` was called; until then it steps where its weights are.
        rescue: Called with the error when a step finds no memory on the device; it may call :meth:`attach`.

    Raises:
        ValueError: The optimizer's step was replaced.
    """

    _replaces_all = True

    def __init__(
        self,
        optimizer: Optimizer,
        engine: str = "auto",
        expects: Callable[[], tuple[float | None, float | None]] = lambda: (None, None),
    ) -> None:
        super().__init__(optimizer, engine)
        if self.own_step == REPLACED:
            name = type(optimizer).__name__
            raise ValueError(f"detached: the step of this {name} was replaced, and would be passed by")
        self.detached: Detached | None = None
        self.rescue: Callable[[torch.OutOfMemoryError], None] | None = None
        self._expects = expects
        self._zero_grad_before: Any = None
        self._masters_copied = False  # whether the snapshot for an undo has the masters

    def attach(self, optimizer: Optimizer, detached: Detached) -> None:
        """Step from masters in host memory from here on."""
        if self.own_step is not None:
            self.own_step = None
            self._amp_before = optimizer.__dict__.get(AMP)
            set_attribute(optimizer, AMP, False)
        self.detached = detached
        detached.last = self.stepping
        self._zero_grad_before = optimizer.__dict__.get("zero_grad")
        optimizer.zero_grad = detached.zero_grad  # type: ignore[method-assign]

    @property
    def writes_in_backward(self) -> bool:  # type: ignore[override] # a constant in the base class
        """See :attr:`Drive.writes_in_backward`."""
        options = None if self.detached is None else self.detached.options
        return options is not None and (options.clip != "exact" or options.delay_one_step)

    def release(self, optimizer: Optimizer) -> None:
        """See :meth:`Drive.release`: the state stays in host memory."""
        try:
            if self.detached is not None:
                self.detached.close()
        finally:
            if self.detached is not None:
                set_attribute(optimizer, "zero_grad", self._zero_grad_before)
            super().release(optimizer)

    def stepper(self, optimizer: Optimizer) -> Steps:
        """See :meth:`Drive.stepper`."""
        return super().stepper(optimizer) if self.detached is None else self.detached

    def extra_tensors(self) -> list[Tensor]:
        """See :meth:`Drive.extra_tensors`."""
        self._masters_copied = self.detached is not None
        masters = {} if self.detached is None else self.detached.masters()
        return [master for p, master in masters.items() if master is not p]

    def undone(self, optimizer: Optimizer) -> None:
        """See :meth:`Drive.undone`."""
        if self.detached is None:
            return
        self.detached.zero_grad()
        self.detached.read_weights()
        if not self._masters_copied:  # the snapshot is of weights and state on the device
            with self.detached.masters_in_place():
                pass  # the end of this context brings the state to the host
            self.detached.set_masters({p: p.detach() for p in self.detached.masters()})

    @contextmanager
    def in_place_of_its_own(self, optimizer: Optimizer) -> Iterator[None]:
        """See :meth:`Drive.in_place_of_its_own`."""
        if self.detached is not None:
            self.detached.last, self.detached.expects = True, self._expects()
        try:
            with super().in_place_of_its_own(optimizer):
                yield
        except BaseException as error:
            if self.detached is not None:
                try:
                    self.detached.zero_grad()
                except RuntimeError as too_late:  # with clip="none", if updates were made that cannot be undone
                    error.add_note(str(too_late))
            raise
        finally:
            if self.detached is not None:
                self.detached.last = False

    def _update(self, optimizer: Optimizer) -> None:
        if self.detached is not None:
            self.detached.step(inputs=self._inputs, loss=self.loss, max_grad_norm=self._max_norm)
            return
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        states = dict(optimizer.state)
        before = _versions(weights, states)
        try:
            if self.own_step is not None:
                inspect.unwrap(type(optimizer).step)(optimizer)
            else:
                super()._update(optimizer)
            return
        except torch.OutOfMemoryError as error:
            if self.rescue is None or before != _versions(weights, states):
                raise  # it came in the middle of the step
            for p in optimizer.state.keys() - states.keys():
                del optimizer.state[p]  # the step has made this state, and may have changed it
            failed = error.with_traceback(None)  # its frames would keep memory
        self.rescue(failed)
        self._update(optimizer)

    def _steps_sparse(self, optimizer: Optimizer) -> bool:
        return self.detached is None and super()._steps_sparse(optimizer)  # `Detached` refuses sparse gradients


def _versions(weights: list[Tensor], states: dict[Any, Any]) -> list[int]:
    """A mark that differs once a weight or a state has changed; a value that is no tensor is then another object."""
    values = [value for state in states.values() if isinstance(state, dict) for value in state.values()]
    return [value._version if isinstance(value, Tensor) else id(value) for value in (*weights, *values)]
