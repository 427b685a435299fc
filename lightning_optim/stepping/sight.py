"""How engines look at the tensors of a bucket, and whether these share memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress

import torch
from torch import Tensor

from lightning_optim.engines.memory import ranges, spans
from lightning_optim.rules.policy import Update
from lightning_optim.stepping.shards import local, same_parts

View = Callable[[Tensor], Tensor]


def view_of(p: Tensor, g: Tensor, update: Update) -> View | None:
    """The view in which an engine must see a parameter's tensors; None: as they are."""
    if p.is_complex():
        return torch.view_as_real  # real and imaginary parts are updated as two numbers, as in torch.optim
    program = update.program
    in_parts = not program.reduces and all(phase.program.adds_up for phase in program.phases)
    if in_parts and same_parts(p, g):
        return local  # element-wise: each rank updates its shard; a reduction needs the DTensor's own operators
    return None


def as_seen(view: View | None, name: str, column: list[Tensor]) -> list[Tensor]:
    """The tensors of one name as an engine looks at them.

    Raises:
        RuntimeError: A tensor that is written is lazily conjugated, so that a copy would be written in its place.
    """
    if view is None:
        return column
    if view is torch.view_as_real and name == "g":
        column = list(map(Tensor.resolve_conj, column))
    return list(map(view, column))


def share_memory(
    params: Sequence[Tensor], gradients: Sequence[Tensor], slots: Sequence[Tensor], copies: Sequence[Tensor]
) -> bool:
    """Whether two tensors that are written share memory, or one of them with a gradient.

    Args:
        params: The parameters of a bucket.
        gradients: The gradient of each; in a report, the parameter itself stands in for a gradient.
        slots: The slots of all of them, with counters.
        copies: The copy of each, or an empty list; ignored where the parameter stands in for the gradient.
    """
    real = [g is not p for g, p in zip(gradients, params, strict=True)]
    given, copies = list(compress(gradients, real)), list(compress(copies, real))
    written = ranges(*spans(list(map(local, [*params, *slots, *copies]))))
    return written is None or written.meet(*spans(list(map(local, given))))
