"""Stepping torch's own optimizers with our engines."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_optim.engines.base import Decision
from lightning_optim.engines.choice import requested_engine
from lightning_optim.engines.scaling import LossScale, Scaling
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.stepping.method import Inputs, Options, Owner
from lightning_optim.stepping.options import check_option
from lightning_optim.stepping.stepper import Stepper
from lightning_optim.stepping.tensors import problem_of_weight

#: For each class of torch's that can be adopted, our class with the same rule.
ADOPTABLE: dict[type[torch.optim.Optimizer], type[RuleOptimizer]] = {
    info.torch_equivalent: info.cls for info in OPTIMIZERS.values() if info.torch_equivalent is not None
}


class Adopted:
    """A ``torch.optim`` optimizer whose parameters and state our engines update: see :func:`adopt`."""

    def __init__(self, optimizer: torch.optim.Optimizer, options: Options) -> None:
        self.optimizer = optimizer
        self._stepper = _stepper(optimizer, options)

    @property
    def scaling(self) -> Scaling | None:
        """How the gradients of the last step were unscaled and clipped; None if they were not."""
        return self._stepper.scaling

    @torch.no_grad()
    def step(
        self,
        *,
        inputs: Inputs | None = None,
        loss: LossScale | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        """Step as ``optimizer.step()`` does, with the instance's step hooks and its schedulers' bookkeeping.

        Args:
            inputs: What a rule may need besides gradients; the rules of torch's optimizers need nothing.
            loss: How the loss was scaled, if it was.
            max_grad_norm: Clip the global gradient norm to this; default: as :func:`adopt` was told.
        """
        optimizer = self.optimizer
        for before in list(optimizer._optimizer_step_pre_hooks.values()):
            before(optimizer, (), {})
        self._stepper.step(inputs=inputs, loss=loss, max_grad_norm=max_grad_norm)
        for after in list(optimizer._optimizer_step_post_hooks.values()):
            after(optimizer, (), {})
        # Schedulers read this to see that the optimizer's step came before theirs.
        optimizer._opt_called = True  # type: ignore[attr-defined] # torch sets it the same way, from outside

    def report(self, *, scaled: bool = False) -> list[Decision]:
        """Which engine steps which parameters, and why; with ``scaled``, if the loss is scaled."""
        return self._stepper.report(scaled=scaled)

    def engine_report(self) -> str:
        """See :meth:`RuleOptimizer.engine_report`."""
        return "\n".join(map(str, self.report()))


def adopt(optimizer: torch.optim.Optimizer, *, engine: str = "auto", max_grad_norm: float | None = None) -> Adopted:
    """Step an instance of ``torch.optim.AdamW``, or of another class in :data:`ADOPTABLE`, with our engines.

    The instance stays what it is: its param groups, its state (the same keys and types), its schedulers and its
    checkpoints; only the arithmetic is done elsewhere. Either may step at any time. (On CUDA our engine keeps the step
    counters on the device, which makes torch's own step wait for it, unless it is ``capturable`` or ``fused``.)

    Args:
        optimizer: The instance.
        engine: As for our own optimizers.
        max_grad_norm: Clip the global gradient norm to this inside the step.

    Raises:
        TypeError: Another optimizer, or a subclass, whose ``step`` may differ.
        ValueError: ``differentiable=True``, an unknown engine, or a weight that cannot be written element by element.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1)
    >>> weight.square().sum().backward()
    >>> adopt(optimizer).step()
    >>> weight.detach()
    tensor([ 0.8000, -1.6000])
    """
    return Adopted(optimizer, _options(optimizer, engine, max_grad_norm))


def why_not_adopted(optimizer: torch.optim.Optimizer) -> str | None:
    """Why our engines cannot step an optimizer of torch's, or None if they can."""
    if type(optimizer) not in ADOPTABLE:
        return (
            f"cannot adopt {type(optimizer).__module__}.{type(optimizer).__qualname__}; valid: "
            f"{', '.join(f'torch.optim.{cls.__name__}' for cls in ADOPTABLE)}"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return "cannot adopt an optimizer with differentiable=True: engines step without autograd"
    return None


def stepper_for(
    optimizer: torch.optim.Optimizer, *, engine: str = "auto", capture: bool = False, owner: Owner | None = None
) -> Stepper:
    """A stepper for an instance to adopt; it does not keep the instance alive.

    Args:
        optimizer: The instance.
        engine: As for our own optimizers.
        capture: Record the steps as CUDA graphs.
        owner: Has the parameters and their state in place of the instance.

    Raises:
        TypeError, ValueError: As for :func:`adopt`.
    """
    return _stepper(optimizer, replace(_options(optimizer, engine, None), capture=capture), owner)


def give_counters_back(optimizer: torch.optim.Optimizer) -> None:
    """Move step counters to the CPU for torch's own step, after steps of an engine that keeps them on a device.

    torch reads them at every step, unless it is ``capturable`` or ``fused``, and would wait for the device each time.
    """
    for group in optimizer.param_groups:
        if not (group.get("capturable") or group.get("fused")):
            for p in group["params"]:
                state = optimizer.state.get(p) or {}
                if isinstance(step := state.get("step"), torch.Tensor) and step.device.type != "cpu":
                    state["step"] = step.cpu()


def _options(optimizer: torch.optim.Optimizer, engine: str, max_grad_norm: float | None) -> Options:
    if (reason := why_not_adopted(optimizer)) is not None:
        raise (TypeError if type(optimizer) not in ADOPTABLE else ValueError)(reason)
    for group in optimizer.param_groups:
        for index, p in enumerate(group["params"]):
            if (problem := problem_of_weight(p)) is not None:
                raise ValueError(
                    f"cannot adopt an optimizer whose parameter {index} of a group cannot be stepped: {problem}"
                )
    if max_grad_norm is not None:
        check_option("adopt", "max_grad_norm", max_grad_norm, 1.0)
    return Options(engine=requested_engine(engine), max_grad_norm=max_grad_norm)


def _stepper(optimizer: torch.optim.Optimizer, options: Options, owner: Owner | None = None) -> Stepper:
    return Stepper(owner or optimizer, ADOPTABLE[type(optimizer)], options, native_state=True)
