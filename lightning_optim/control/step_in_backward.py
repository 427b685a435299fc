"""Stepping each parameter as soon as its gradient is there, so that the gradients of a model never exist together.

This is known as gradient release or optimizer-in-backward: it saves the memory of all gradients but a few, and the
updates run while the backward pass still computes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_optim.engines.base import Decision
from lightning_optim.engines.scaling import LossScale, Scaling
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.stepping.evaluations import request_of
from lightning_optim.stepping.method import Group, Inputs
from lightning_optim.stepping.options import check_option
from lightning_optim.stepping.stepper import Stepper
from lightning_optim.stepping.together import why_together

Clip = Literal["per_tensor", "previous_norm"]
CLIPS: tuple[Clip, ...] = get_args(Clip)


class _One:
    """A view of an optimizer that has only one of its parameters."""

    def __init__(self, optimizer: RuleOptimizer, group: Group, p: Tensor) -> None:
        self._optimizer, self.group, self._param = weakref.ref(optimizer), group, p

    def _whole(self) -> RuleOptimizer:
        if (optimizer := self._optimizer()) is None:
            raise RuntimeError("step_in_backward: its optimizer no longer exists")
        return optimizer

    @property
    def param_groups(self) -> list[Group]:
        return [{**self.group, "params": [self._param]}]

    @property
    def state(self) -> Any:
        return self._whole().state


class StepInBackward:
    """Makes backward passes step an optimizer's parameters.

    From the second window on (a window is what one :meth:`finish` ends), each parameter is stepped when its gradient
    is complete, and the gradient is freed. The first window only observes how often each gradient is added to: with
    reentrant checkpointing, or with weights used in several graphs, this is more than once, and a step must wait for
    the last time.

    The results are bit for bit those of ordinary steps, except for clipping, which needs the norm of gradients that are
    not there yet. There are two approximations of it:

    - ``"per_tensor"``: each gradient's own norm is clipped to ``max_norm``;
    - ``"previous_norm"``: the global norm of the step before stands in for this step's.

    With accumulation, set :attr:`last` to False before all backward passes of a window but its last: gradients then
    add up as usual, and only in the last pass are they freed one by one. A loss scale is not supported: whether a step
    is to be left out is known only after the last gradient.

    Args:
        optimizer: One of ours, all of whose parameters are ordinary tensors (not sharded, not in DDP, whose gradients
            are reduced later).
        max_norm: The norm to clip to; None: no clipping.
        clip: The approximation of clipping; needed with ``max_norm``.

    Raises:
        TypeError: The optimizer is not one of ours that steps parameter by parameter, by gradients alone.
        ValueError: ``max_norm`` is given without ``clip``, ``clip`` is unknown, or the optimizer has a
            ``max_grad_norm``.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> import lightning_optim
    >>> optimizer = lightning_optim.SGD([weight], lr=0.5)
    >>> backward = StepInBackward(optimizer)
    >>> for _ in range(2):
    ...     weight.square().sum().backward()
    ...     backward.finish()
    >>> weight.tolist(), weight.grad
    ([0.0, 0.0], None)
    """

    def __init__(self, optimizer: RuleOptimizer, *, max_norm: float | None = None, clip: Clip | None = None) -> None:
        name = "step_in_backward"
        if not isinstance(optimizer, RuleOptimizer) or type(optimizer._stepper) is not Stepper:
            raise TypeError(f"{name}: {type(optimizer).__name__} does not step parameter by parameter")
        if request_of(optimizer) is not None:
            raise TypeError(f"{name}: {type(optimizer).__name__}, whose step asks for more than gradients")
        if (reason := why_together(type(optimizer), optimizer.param_groups)) is not None:
            raise TypeError(f"{name}: {type(optimizer).__name__} does not step parameter by parameter: {reason}")
        if clip is not None and clip not in CLIPS:
            raise ValueError(f"{name}: clip={clip!r}; valid: None, {', '.join(CLIPS)}")
        if max_norm is not None:
            check_option(name, "max_grad_norm", max_norm, 1.0)
            if clip is None:
                raise ValueError(
                    f"{name}: max_norm={max_norm} cannot be exact: the global norm is known only when all gradients "
                    f"are; valid: clip={' or '.join(map(repr, CLIPS))}, which are approximations, or max_norm=None"
                )
        if optimizer.options.max_grad_norm is not None:
            raise ValueError(
                f"{name}: max_grad_norm={optimizer.options.max_grad_norm} of the optimizer cannot be exact; give "
                f"max_norm= and clip={' or '.join(map(repr, CLIPS))} here instead"
            )
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.clip = clip
        self.last = True
        self._expected: Counter[Tensor] | None = None
        self._fired: Counter[Tensor] = Counter()
        self._stepped: set[Tensor] = set()
        self._squares: list[Tensor] = []
        self._previous: Tensor | None = None
        self._steppers: dict[Tensor, Stepper] = {}
        self._views: dict[Tensor, _One] = {}  # a stepper does not keep its view alive
        self._handles: dict[Tensor, Any] = {}
        self.watch()

    def watch(self) -> None:
        """Update the hooks on parameters that require gradients: groups are added, unfrozen, removed and reordered.

        :meth:`finish` calls this. Call it before a backward pass as well, if the optimizer may have changed since.
        """
        options = replace(self.optimizer.options, capture=False)  # there is no single step to capture
        hook = partial(_on_gradient, weakref.ref(self))
        number = 0
        gone = set(self._steppers)
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p in self._steppers:
                    self._views[p].group = group  # loading makes new groups
                    gone.discard(p)
                elif p.requires_grad:
                    self._views[p] = view = _One(self.optimizer, group, p)
                    self._steppers[p] = stepper = Stepper(view, type(self.optimizer), options)
                    stepper.number_parameters([number])
                    self._handles[p] = p.register_post_accumulate_grad_hook(hook)
                number += 1
        for p in gone:
            self._handles.pop(p).remove()
            del self._steppers[p], self._views[p]

    def discard(self) -> None:
        """Forget a window that was interrupted; parameters that it has stepped stay stepped."""
        self._fired, self._stepped, self._squares = Counter(), set(), []

    @torch.no_grad()
    def finish(self) -> None:
        """End a window: step what has not been stepped yet.

        Raises:
            RuntimeError: A gradient came after its parameter had been stepped: the graph is not that of the first
                window. The parameter's update is not undone.
        """
        self.watch()
        late = [p for p in self._stepped if p.grad is not None]
        left = [p for p in self._steppers if p.grad is not None and p not in self._stepped]
        whole = self._expected is None
        self._expected = self._fired if self._expected is None else self._expected | self._fired
        self._fired, self._stepped = Counter(), set()
        if late:
            shapes = ", ".join(str(tuple(p.shape)) for p in late[:5])
            raise RuntimeError(
                f"step_in_backward: {len(late)} gradients (of parameters of shape {shapes}) grew after their "
                "parameters had been stepped: the backward pass is not always the same; valid: step_in_backward=False"
            )
        if whole:
            self._step_all(left)
        else:
            for p in left:
                self._step(p)
        if self._squares:
            first = self._squares[0].device
            self._previous = torch.stack([s.to(first, non_blocking=True) for s in self._squares]).sum().reshape(1)
            self._squares = []

    @property
    def scaling(self) -> Scaling | None:
        """How gradients were clipped in a step of all parameters together, such as the first window's."""
        return self.optimizer._stepper.scaling

    def step(
        self,
        *,
        inputs: Inputs | None = None,
        loss: LossScale | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        """End a window, by :meth:`finish`.

        Raises:
            ValueError: Inputs, a loss scale or a limit is given: it is too late, as most parameters have been stepped.
        """
        if inputs is not None or loss is not None or max_grad_norm is not None:
            what = "the rule needs inputs" if inputs is not None else f"max_grad_norm={max_grad_norm}"
            what = "the loss is scaled" if loss is not None else what
            raise ValueError(f"step_in_backward: {what}, but steps were made in the backward pass; valid: neither")
        self.finish()

    def report(self, *, scaled: bool = False) -> list[Decision]:
        """Which engine steps which parameters, and why; with ``scaled``, if the loss is scaled."""
        return self.optimizer._stepper.report(scaled=scaled)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles.values():
            handle.remove()

    @torch.no_grad()
    def _on_gradient(self, p: Tensor) -> None:
        if not self.last:
            return
        self._fired[p] += 1
        # A parameter that earlier windows have not seen waits for `finish`.
        if self._expected is not None and self._fired[p] == self._expected[p]:
            try:
                self._step(p)
            finally:
                if p.grad is None:  # also where an interrupt came after its step
                    self._stepped.add(p)

    def _step_all(self, params: list[Tensor]) -> None:
        """Make the first window's step, which has all gradients and so is exact, except with ``"per_tensor"``."""
        if self.clip == "per_tensor" or not params:
            for p in params:
                self._step(p)
            return
        stepper = self.optimizer._stepper
        try:
            stepper.step(max_grad_norm=self.max_norm)
        finally:
            self._free(stepper, params)
        if stepper.scaling is not None and stepper.scaling.squares is not None:
            self._squares.append(stepper.scaling.squares.sum())

    def _step(self, p: Tensor) -> None:
        self.optimizer.asked_for(None)  # refuses steps that would go wrong
        stepper = self._steppers[p]
        try:
            if self.max_norm is None or self.clip == "per_tensor":
                stepper.step(max_grad_norm=self.max_norm)
            else:
                stepper.plan(scaled=True)
                squares = stepper.squares()
                self._squares.append(squares.sum())
                known = squares if self._previous is None else self._previous
                stepper.run(Scaling(self.max_norm, None, known.to(squares.device, non_blocking=True)))
        finally:
            self._free(stepper, [p])

    @staticmethod
    def _free(stepper: Stepper, params: list[Tensor]) -> None:
        """Free the gradients of a step that has written; a step that failed before can be tried again with its own."""
        if stepper.has_written:
            for p in params:
                p.grad = None


def _on_gradient(owner: weakref.ref[StepInBackward], p: Tensor) -> None:
    # A hook that held its owner would keep optimizer and state alive as long as the model.
    if (stepping := owner()) is not None:
        stepping._on_gradient(p)
