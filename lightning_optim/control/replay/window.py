"""Evaluating an accumulation window again, with the same batches and the same noise, at other weights.

SAM and line searches need the loss and the gradient of a step's whole window at more than one point; Sophia needs its
second derivative. This module knows nothing of a trainer: it records evaluations of a module, and repeats them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.control.replay.missing import Marks, Missing, marks_of
from lightning_optim.control.replay.module_state import ModuleState

__all__ = ["ModuleState", "RandomStates", "Window", "muted", "replaced"]


class RandomStates:
    """The states of the random number generators: Python's, NumPy's if it is in use, torch's on the CPU and devices.

    Args:
        devices: The devices whose generators are included.

    >>> states = RandomStates()
    >>> first = torch.rand(2), random.random()
    >>> states.put_back()
    >>> torch.equal(torch.rand(2), first[0]), random.random() == first[1]
    (True, True)
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else (numpy.random, numpy.random.get_state())
        self._cpu = torch.get_rng_state()
        # For CUDA this reads a seed and an offset that the host keeps, without waiting for the device.
        self._devices = [
            (_generators(device), _of(device), _generators(device).get_rng_state(*_of(device)))
            for device in devices
            if device.type not in ("cpu", "meta")
        ]

    def put_back(self) -> None:
        """Set all generators to these states."""
        random.setstate(self._python)
        if self._numpy is not None:
            self._numpy[0].set_state(self._numpy[1])
        torch.set_rng_state(self._cpu)
        for generators, device, state in self._devices:
            generators.set_rng_state(state, *device)


def _generators(device: torch.device) -> Any:
    return torch.get_device_module(device.type)


def _of(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # MPS has one generator


@dataclass(frozen=True)
class _Evaluation:
    run: Callable[[], Any]
    noise: RandomStates
    state: ModuleState


class Window:
    """The evaluations that make up one step, which can be repeated at other weights.

    Until :meth:`clear`, it keeps what was evaluated (with its batch, on its device), the generators' states, and copies
    of the buffers that differ from one evaluation to the next. If it is told of the backward passes, by
    :meth:`before_backward`, :meth:`after_backward` and :meth:`end`, a replay drops gradients at the places where they
    were dropped.

    Args:
        module: The module that is evaluated.
        loss_of: Returns the loss in an evaluation's output, as it is to be differentiated; None if there is none.
        params: Returns the parameters that are trained; default: the module's.

    Attributes:
        touched: Whether gradients were written to after a backward pass. A replay does not repeat that, unless it set
            all of them to zero.

    >>> weight = nn.Parameter(torch.tensor(1.0))
    >>> window = Window(nn.Module(), lambda output: output / 2)
    >>> for batch in (3.0, 5.0):
    ...     _ = window.run(lambda batch=batch: (weight * batch + torch.rand(())).square())
    >>> with torch.no_grad():
    ...     window.replay(lambda loss: None).item() == window.loss.item()
    True
    """

    def __init__(
        self,
        module: nn.Module,
        loss_of: Callable[[Any], Tensor | None],
        params: Callable[[], Iterable[Tensor]] | None = None,
    ) -> None:
        self._module, self._loss_of = module, loss_of
        self._params = module.parameters if params is None else params
        self._evaluations: list[_Evaluation] = []
        self.clear()

    def __len__(self) -> int:
        return len(self._evaluations)

    @property
    def loss(self) -> Tensor:
        """The sum of the recorded losses, without those whose gradients were dropped."""
        total: Tensor | None = None
        for number, loss in enumerate(self._losses):
            total = self._added(total, loss, number)  # in the order of `replay`: the same weights give the same bits
        assert total is not None  # noqa: S101 # the window is not empty
        return total

    @property
    def is_left(self) -> bool:
        """Whether a gradient of the recorded evaluations is left, as far as the host knows."""
        return bool(self._evaluations) and not any(missing.everything for missing in self._at_end)

    def clear(self) -> None:
        """Forget what was recorded."""
        self._evaluations.clear()
        self._losses: list[Tensor] = []
        self._missing: dict[int, Missing] = {}  # by evaluation, what was missing before its backward pass
        self._at_end: list[Missing] = []
        self._marks: Marks | None = None
        self.touched = False

    def before_backward(self) -> None:
        """Note which gradients are there before the backward pass of the last evaluation."""
        if self._marks is not None:  # a replay, too, has no gradients before its first backward pass
            self._missing[len(self._evaluations) - 1] = self._missing_now()

    def after_backward(self) -> None:
        """Note which gradients there are after a backward pass."""
        self._marks = marks_of(self._params())

    @contextmanager
    def rescaling(self) -> Iterator[None]:
        """A context in which gradients are multiplied, if replays give the losses the same factors.

        That is no writing to gradients of which anything would have to be repeated; any other still is.
        """
        known, before = set(self._marks or ()), marks_of(self._params())
        yield
        if self._marks is not None:
            after = marks_of(self._params())
            self._marks += [new for old, new in zip(before, after, strict=True) if old in known]

    def end(self) -> None:
        """Note which gradients are left at the end. May be called again, should more have been dropped."""
        if self._marks is not None:
            self._at_end.append(self._missing_now())
            self.after_backward()

    def run(self, evaluate: Callable[[], Any]) -> Any:
        """Make and record an evaluation.

        Args:
            evaluate: Makes the evaluation; it keeps its own batch.

        Returns:
            What ``evaluate`` returned. The evaluation is recorded only if there is a loss in that.
        """
        noise = RandomStates(self._devices())
        state = ModuleState(self._module, self._evaluations[-1].state if self._evaluations else None)
        output = evaluate()
        loss = self._loss_of(output)
        if loss is not None:
            self._evaluations.append(_Evaluation(evaluate, noise, state))
            self._losses.append(loss.detach().clone().reshape(()))
        return output

    def replay(
        self,
        backward: Callable[[Tensor], None],
        between: Callable[[], AbstractContextManager[Any]] = nullcontext,
        held: MutableMapping[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Make all evaluations again, with the noise and the buffers that each of them had.

        Afterwards generators, buffers and metrics are as they were before.

        Args:
            backward: Called with each loss.
            between: Makes a context for all evaluations but the last one, such as ``no_sync`` of DDP.
            held: The sums that ``backward`` adds to, by parameter, from which gradients are dropped; default: the
                gradients.

        Returns:
            The sum of the losses, as :attr:`loss` is.

        Raises:
            RuntimeError: An evaluation that returned a loss now returns none.
            ValueError: No evaluation was recorded.
        """
        noise, state = RandomStates(self._devices()), ModuleState(self._module, metrics=True)
        total: Tensor | None = None
        try:
            for number, evaluation in enumerate(self._evaluations, start=1):
                evaluation.noise.put_back()
                evaluation.state.put_back()
                with between() if number < len(self._evaluations) else nullcontext():
                    loss = self._loss_of(evaluation.run())
                    if loss is None:
                        raise RuntimeError(
                            f"batch {number} of {len(self._evaluations)} had a loss and, evaluated again at other "
                            "weights, has none; valid: a training_step that decides by its batch alone"
                        )
                    if (missing := self._missing.get(number - 1)) is not None:
                        missing.drop(held)
                    backward(loss)
                total = self._added(total, loss.detach().reshape(()), number - 1)
            for missing in self._at_end:
                missing.drop(held)
        finally:
            noise.put_back()
            state.put_back()
        if total is None:
            raise ValueError("there is nothing to replay: no evaluation was recorded")
        return total

    def _missing_now(self) -> Missing:
        assert self._marks is not None  # noqa: S101 # callers check this
        missing = Missing(self._params(), self._marks)
        self.touched |= missing.touched
        return missing

    def _added(self, total: Tensor | None, loss: Tensor, number: int) -> Tensor:
        """The sum of losses after an evaluation, whose loss is added."""
        if (missing := self._missing.get(number)) is not None:
            total = missing.kept(total)
        return loss if total is None else total + loss

    def _devices(self) -> set[torch.device]:
        return {tensor.device for tensors in (self._module.parameters(), self._module.buffers()) for tensor in tensors}


@contextmanager
def muted(owner: Any, *methods: str) -> Iterator[None]:
    """A context in which methods of an object do nothing, whatever they are given.

    Args:
        owner: The object.
        methods: Their names.

    >>> class Talking:
    ...     def say(self, word):
    ...         print(word)
    >>> talking = Talking()
    >>> with muted(talking, "say"):
    ...     talking.say("no")
    >>> talking.say("yes")
    yes
    """
    with ExitStack() as all_of_them:
        for name in methods:
            all_of_them.enter_context(replaced(owner, name, _nothing))
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """A context in which an attribute of an object has another value.

    >>> text = nn.Module()
    >>> with replaced(text, "forward", len):
    ...     text("abc")
    3
    """
    missing = object()
    before = owner.__dict__.get(name, missing)
    try:
        owner.__dict__[name] = value
        yield
    finally:
        if before is missing:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = before


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing, in place of a method."""
