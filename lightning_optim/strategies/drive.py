"""Stepping one optimizer by our engines in place of its own ``step``, whoever calls it.

Lightning's order of hooks, closures and schedulers depends on ``optimizer.step(closure)``, which it calls in several
ways. So that method is replaced while a step lasts: clipping and unscaling that are asked for before the call are
noted, and done inside of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_optim.adopt import give_counters_back, stepper_for, why_not_adopted
from lightning_optim.control.step_in_backward import StepInBackward
from lightning_optim.engines.choice import requested_engine
from lightning_optim.engines.scaling import LossScale
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.stepping.method import Inputs, Options
from lightning_optim.stepping.stepper import Stepper
from lightning_optim.stepping.steps import Steps

AMP = "_step_supports_amp_scaling"

#: Why an optimizer has to run its own step: it is not that of its class.
REPLACED = "its step was replaced"


def why_own_step(optimizer: Optimizer) -> str | None:
    """Why an optimizer has to run its own step, or None if our engines may do it."""
    if isinstance(optimizer, RuleOptimizer):
        if inspect.unwrap(type(optimizer).step) is not inspect.unwrap(RuleOptimizer.step):
            return "its class has a step of its own"
    elif (reason := why_not_adopted(optimizer)) is not None:
        return reason
    replaced = optimizer.__dict__.get("step")  # schedulers put a wrapper there that only counts
    if replaced is not None and not hasattr(replaced, "_wrapped_by_lr_sched"):
        return REPLACED
    return None


class Drive:
    """One optimizer under a strategy. It keeps no reference to the optimizer, nor to any state.

    Args:
        optimizer: The optimizer.
        engine: The engine for torch's optimizers, and for ours if it is not ``"auto"``.
        capture: Whether to record the step as a CUDA graph.

    Attributes:
        own_step: Why the optimizer runs its own step; None: our engines step it.
        stepping: Whether a step is going on.
        loss: How the loss of the step was scaled, if it was.
        backward: Steps the parameters in the backward pass; None: they are stepped after it.
    """

    def __init__(self, optimizer: Optimizer, engine: str, *, capture: bool = False) -> None:
        self.own_step = why_own_step(optimizer)
        self.stepping = False
        self._engine = requested_engine(engine)
        self.loss: LossScale | None = None
        self.backward: StepInBackward | None = None
        self._inputs: Inputs | None = None
        self._found_inf: Tensor | None = None
        self._max_norm: float | None = None
        self._adopted: Stepper | None = None
        # For modules that override `configure_gradient_clipping`: the gradients when the module asked for clipping, and
        # whether it leaves them alone afterwards, as the first step shows.
        self._seen: _Gradients | None = None
        self._undisturbed: bool | None = None
        self._options_before: Options | None = None
        self._amp_before: bool | None = None
        if self.own_step is not None:
            return
        if not isinstance(optimizer, RuleOptimizer):
            self._adopted = stepper_for(optimizer, engine=engine, capture=capture)
        else:
            self._options_before = optimizer.options
            if engine != "auto":
                optimizer.use_engine(engine)
            if capture:
                optimizer.capture_steps()
        # If this is true, Lightning neither clips nor calls the scaler's `unscale_`. torch sets it on instances, too.
        self._amp_before = optimizer.__dict__.get(AMP)
        set_attribute(optimizer, AMP, False)

    #: Whether :meth:`_update` also steps optimizers that run their own step.
    _replaces_all = False

    #: Whether weights or state change before the backward pass has ended.
    writes_in_backward = False

    def extra_tensors(self) -> list[Tensor]:
        """Tensors that a step changes beside weights and state, such as masters; an undo puts them back, too."""
        return []

    def undone(self, optimizer: Optimizer) -> None:
        """Follow an undo: all tensors are what they were before, and the present gradients are not wanted."""

    def release(self, optimizer: Optimizer) -> None:
        """Leave the optimizer as it was found."""
        if self.own_step is None:
            set_attribute(optimizer, AMP, self._amp_before)
        if self._adopted is not None:
            give_counters_back(optimizer)
        if isinstance(optimizer, RuleOptimizer) and self._options_before is not None:
            optimizer.use_engine(self._options_before.engine)
            optimizer.capture_steps(self._options_before.capture)
        if self.backward is not None:
            self.backward.remove()
            self.backward = None

    def stepper(self, optimizer: Optimizer) -> Steps:
        """What steps the optimizer."""
        if self.backward is not None:
            return self.backward
        stepper = optimizer._stepper if isinstance(optimizer, RuleOptimizer) else self._adopted
        if stepper is None:
            raise TypeError(f"{type(optimizer).__name__} runs its own step: {self.own_step}")
        return stepper

    def requested(self, optimizer: Optimizer) -> str:
        """The engine that was asked for."""
        return optimizer.options.engine if isinstance(optimizer, RuleOptimizer) else self._engine

    def postpones(self, optimizer: Optimizer) -> bool:
        """Whether what is to be done to the gradients can wait for the step that is going on."""
        return self.stepping and self.own_step is None and not self._steps_sparse(optimizer)

    @contextmanager
    def in_place_of_its_own(self, optimizer: Optimizer) -> Iterator[None]:
        """A context in which ``optimizer.step`` is ours, with its hooks and its record in profiles."""
        if self.own_step is not None and not self._replaces_all:
            yield
            return
        before = optimizer.__dict__.get("step")
        # It is ours no longer than this: between two steps, schedulers and others put wrappers of theirs there.
        optimizer.step = MethodType(Optimizer.profile_hook_step(self._step), optimizer)  # type: ignore[method-assign]
        self.stepping = True
        if self.backward is not None:
            self.backward.watch()
            self.backward.last = True
        try:
            yield
        except BaseException:
            if self.backward is not None:
                self.backward.discard()
            raise
        finally:
            if self.backward is not None:
                self.backward.last = False
            set_attribute(optimizer, "step", before)
            self.stepping, self._max_norm, self.loss, self._seen, self._inputs = False, None, None, None, None

    def clip(self, optimizer: Optimizer, max_norm: float, stock: Callable[[], None], *, has_its_own_way: bool) -> None:
        """Clip the gradients' global norm in the step to come.

        Args:
            optimizer: The optimizer.
            max_norm: The limit.
            stock: Clips at once.
            has_its_own_way: The module asks for this in a ``configure_gradient_clipping`` of its own, which may do
                more than that.
        """
        if self.backward is not None:
            return  # it clips itself, in the way that it was told
        if has_its_own_way:
            if not self._undisturbed:
                stock()
                self._seen = _Gradients(optimizer) if self._undisturbed is None else None
                return
            self._seen = _Gradients(optimizer)
        own = optimizer.options.max_grad_norm if isinstance(optimizer, RuleOptimizer) else None
        if own is not None:
            raise ValueError(two_limits(type(optimizer).__name__, own, max_norm))
        self._max_norm = max_norm if self._max_norm is None else min(max_norm, self._max_norm)

    def _step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any] | None = None,
        *,
        evaluate: Callable[[], Tensor] | None = None,
    ) -> Any:
        """The method that replaces ``optimizer.step``."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._check_undisturbed(optimizer)
        if isinstance(optimizer, RuleOptimizer):
            self._inputs = optimizer.asked_for(evaluate)
        with torch.no_grad():
            self._update(optimizer)
        # Schedulers look at this to see that a step came before theirs.
        optimizer._opt_called = True  # type: ignore[attr-defined] # torch sets it the same way, from outside
        return result

    def _update(self, optimizer: Optimizer) -> None:
        """Update weights and state."""
        if self._steps_sparse(optimizer):
            inspect.unwrap(type(optimizer).step)(optimizer)
        else:
            self.stepper(optimizer).step(inputs=self._inputs, loss=self.loss, max_grad_norm=self._max_norm)

    def _steps_sparse(self, optimizer: Optimizer) -> bool:
        """Whether torch's own step is needed for a gradient that is sparse."""
        return _is_sparse(optimizer)

    def cleared_flag(self, scale: Tensor) -> Tensor:
        """The flag that a step sets if it is left out, set to zero; a CUDA graph needs it in the same place always."""
        if self._found_inf is None or self._found_inf.device != scale.device:
            self._found_inf = torch.zeros_like(scale)
        return self._found_inf.zero_()

    def _check_undisturbed(self, optimizer: Optimizer) -> None:
        """Check whether the gradients still are what they were when the module asked for clipping."""
        if self._seen is None:
            return
        now = _Gradients(optimizer)
        same = self._seen.marks == now.marks
        if self._undisturbed is None:
            self._undisturbed = same
        elif not same and set(now.marks) <= set(self._seen.marks):
            self._clip_what_is_left(optimizer, self._seen.gradients)
        elif not same and not now.are_zero():
            raise RuntimeError(
                "configure_gradient_clipping changed gradients after it had called clip_gradients, and had not done so "
                "at the first step: they are clipped in the optimizer's step, after that change. Change them first, "
                "or clip them with torch.nn.utils.clip_grad_norm_"
            )

    def _clip_what_is_left(self, optimizer: Optimizer, seen: list[Tensor]) -> None:
        """Clip the gradients that are left; those that were dropped since still count for the norm."""
        if self._max_norm is not None and (left := [p for p in _params(optimizer) if p.grad is not None]):
            norm = torch.nn.utils.get_total_norm(seen)
            torch.nn.utils.clip_grads_with_norm_(left, self._max_norm, norm)
        self._max_norm = None


class _Gradients:
    """An optimizer's gradients, and marks that tell whether they are still the same."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.gradients = list(_grads(optimizer))  # kept alive, so that no other tensor gets the same id
        self.marks = [(id(g), g._version) for g in self.gradients]

    def are_zero(self) -> bool:
        """Whether all of them are zero, so that clipping does not change them."""
        return not any(bool((g != 0).any()) for g in self.gradients)


def two_limits(optimizer: str, own: float, other: float) -> str:
    """The message for gradients that would be clipped twice."""
    return (
        f"gradients would be clipped twice: {optimizer} has max_grad_norm={own!r}, and the Trainer or the module "
        f"gradient_clip_val={other!r}; valid: one of them"
    )


def set_attribute(owner: object, name: str, value: Any) -> None:
    """Set an attribute of the instance, or remove it where ``value`` is None."""
    if value is None:
        owner.__dict__.pop(name, None)
    else:
        setattr(owner, name, value)


def _params(optimizer: Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _grads(optimizer: Optimizer) -> Iterator[Tensor]:
    return (p.grad for p in _params(optimizer) if p.grad is not None)


def _is_sparse(optimizer: Optimizer) -> bool:
    """Whether a gradient is sparse; of torch's optimizers that we adopt, only SGD takes such gradients."""
    return type(optimizer) is SGD and any(g.layout is not torch.strided for g in _grads(optimizer))
