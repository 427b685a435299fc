"""Which gradient overflowed first: for the error of a loss scaler that gives up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.param_groups import own_name
from lightning_optim.stepping.shards import local


class BackwardWatch:
    """Notes which gradients are inf or NaN, in the order in which the backward pass computes them.

    The notes are made on the device: the host waits for nothing before it asks for them.

    Args:
        params: The parameters, which get a hook each until :meth:`remove`.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._gradients: list[tuple[int, Tensor]] = []
        self._losses: list[Tensor] = []
        # The hooks know positions, not parameters: with these they would be cycles that nothing frees.
        self._handles = [
            p.register_hook(partial(self._note_gradient, position))
            for position, p in enumerate(params)
            if p.requires_grad
        ]

    def note_loss(self, loss: Tensor) -> None:
        """Take note of a loss, before it is scaled."""
        self._losses.append(is_finite(loss.detach()))

    def clear(self) -> None:
        """Begin anew, for the next step."""
        self._gradients.clear()
        self._losses.clear()

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self.clear()

    def overflowed(self) -> list[int]:
        """The positions of the parameters whose gradients were inf or NaN, in the order of the backward pass."""
        return list(dict.fromkeys(position for position, finite in self._gradients if not finite))

    def loss_is_finite(self) -> bool:
        """Whether every loss was finite, as far as was seen."""
        return all(map(bool, self._losses))

    def _note_gradient(self, position: int, gradient: Tensor) -> None:
        self._gradients.append((position, is_finite(gradient)))


@dataclass(frozen=True)
class Overflow:
    """What was inf or NaN in a step; its text is one or more sentences.

    Attributes:
        parameters: The names of the parameters whose gradients were, in the order of the backward pass.
        of: How many parameters the optimizer has.
        weights: The names of the parameters that are so themselves.
        loss: Whether the loss was, as far as was seen.
    """

    parameters: list[str]
    of: int
    weights: list[str]
    loss: bool

    @property
    def is_beyond_scaling(self) -> bool:
        """Whether no loss scale can help."""
        return self.loss or bool(self.weights)

    def __str__(self) -> str:
        told = ["The loss itself was inf or NaN."] if self.loss else []
        if self.parameters:
            told.append(
                f"The first such gradient in the backward pass was that of {self.parameters[0]}; "
                f"{len(self.parameters)} of {self.of} parameters had one."
            )
        else:
            told.append("No gradient that this process still has was such a one; the errors of others may say more.")
        if self.weights:
            told.append(f"Weights are inf or NaN as well, such as {self.weights[0]}.")
        return " ".join(told)


@torch.no_grad()
def find_overflow(optimizer: Optimizer, module: nn.Module | None, watch: BackwardWatch | None) -> Overflow:
    """Find out which gradient of a step overflowed first; this waits for the device.

    Of sharded parameters each process looks at its own shards.

    Args:
        optimizer: The optimizer, before its gradients are gone.
        module: The module that knows the names of the parameters; None: the optimizer's param groups may.
        watch: What was noted in the step's backward pass. Without it, or where hooks are not called for the parameters,
            the last of the optimizer's comes first, as in the backward pass of most models.
    """
    params, names = parameters_of(optimizer), _names(optimizer, module)
    overflowed = watch.overflowed() if watch is not None else []
    if not overflowed:
        gradients = [(position, p.grad) for position, p in enumerate(params) if p.grad is not None]
        overflowed = [position for position, gradient in reversed(gradients) if not is_finite(gradient)]
    return Overflow(
        parameters=[names[position] for position in overflowed],
        of=len(params),
        weights=[name for name, p in zip(names, params, strict=True) if not is_finite(p)],
        loss=watch is not None and not watch.loss_is_finite(),
    )


def is_finite(tensor: Tensor) -> Tensor:
    """Whether all elements, of a sharded tensor those of this process, are finite: one bool, where the tensor is."""
    tensor = local(tensor)
    return (tensor._values() if tensor.is_sparse else tensor).isfinite().all()


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of all groups, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _names(optimizer: Optimizer, module: nn.Module | None) -> list[str]:
    """The names of an optimizer's parameters, without what wrappers put into them."""
    by_module = {} if module is None else {p: own_name(name) for name, p in module.named_parameters()}
    return [
        by_module.get(p) or own_name(name)
        for index, group in enumerate(optimizer.param_groups)
        for p, name in zip(group["params"], _names_in(index, group), strict=True)
    ]


def _names_in(index: int, group: Mapping[str, Any]) -> Iterator[str]:
    names = group.get("param_names") or ()
    for position, p in enumerate(group["params"]):
        known = position < len(names)
        yield names[position] if known else f"parameter {position} (shape {tuple(p.shape)}) of param group {index}"
