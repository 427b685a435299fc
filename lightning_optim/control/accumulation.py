"""Accumulating gradients over windows of batches: windows by schedule, of their real length, weighted if asked for.

The usual way, to divide each loss by a constant and to step at every N-th batch, is wrong in two cases. The last window
of an epoch is shorter, and its gradient then too small; and batches with few tokens count as much as batches with many,
so that the step does not follow the gradient of the mean over all tokens.

Here each batch's share is known when it ends the window: what was accumulated before is multiplied once, and the last
batch's loss by its own factor. Both happen before the last backward pass, so that hooks on gradients, clipping, loss
scalers and the reduction over processes meet the gradient that the step is going to have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_optim.checks import NONNEGATIVE, WrongTypeError, check_number, shown
from lightning_optim.control.schedules.windows import By, Windows
from lightning_optim.stepping.shards import local

#: Returns the weight of a batch: how many tokens, samples or pixels its loss is the mean of.
Weigh = Callable[[Any], Any]


class Accumulator:
    """Says when to step, and gives every batch of a window its share of the gradient.

    The gradient of a window is the mean of its batches' gradients over the batches that it really has; with ``weigh``,
    the weighted mean over its batches and over all processes, whose gradients are expected to be averaged (as DDP and
    FSDP do). A loss is expected to be the mean over whatever the weight counts.

    With weights nothing is read back from the device. In several processes, one number per window is summed over them,
    so that all must end their windows together. A window whose weights are all zero gives zero gradients.

    Args:
        windows: How many batches make a step, or a dict of such numbers by the epoch or step at which they begin to
            hold, counted from 0.
        by: What the keys of the dict count: ``"epoch"`` or ``"step"``.
        weigh: Returns the weight of a batch, as a number or a tensor with one element; or the name under which the
            batch has it, as a key or an attribute. None: all batches weigh the same.
        across_epochs: Whether windows run on over the ends of epochs. If not, an epoch's last batch ends its window.
        distributed: Whether weights are summed over the processes of torch's default group; None: if there is one.
        name: Who it is in errors.

    Attributes:
        steps: Whether the present batch ends its window, so that the optimizer is to step after its backward pass.
        length: The number of batches in the present window, by which a loss is to be divided.
        position: How many batches of the window are over.

    Raises:
        ValueError, WrongTypeError: An option is not valid.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> accumulator = Accumulator(2, weigh=len)
        >>> for batch in accumulator.batches([torch.ones(2, 3), torch.ones(6, 3), torch.ones(1, 3)]):
        ...     accumulator.share(model(batch).mean(), batch, model.parameters()).backward()
        ...     if accumulator.steps:
        ...         print(model.weight.grad)
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        tensor([[1., 1., 1.]])
        tensor([[1., 1., 1.]])

    References:
        McCandlish et al., An Empirical Model of Large-Batch Training, arXiv:1812.06162, for windows that grow.
    """

    def __init__(
        self,
        windows: int | dict[int, int] = 1,
        by: By = "epoch",
        weigh: Weigh | str | None = None,
        across_epochs: bool = False,
        *,
        distributed: bool | None = None,
        name: str = "Accumulator",
    ) -> None:
        self.name = name
        self.windows = Windows.checked(self.name, windows, by, across_epochs)
        if not (weigh is None or callable(weigh) or (isinstance(weigh, str) and weigh)):
            valid = "None, a function of a batch, or the name under which a batch has its weight"
            raise WrongTypeError(f"{self.name}: weigh={shown(weigh)}; valid: {valid}")
        self.weigh = weigh
        self.distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Begin a new run."""
        self.epoch, self.step = 0, 0
        self._reference: Tensor | None = None
        self.drop()

    def drop(self) -> None:
        """Forget the window that is open, if one is: the next batch begins another."""
        self.position, self.length, self.steps = 0, self.windows.at(self.epoch, self.step), False
        self.resumed_at = self._rest = 0
        self._divisor, self._count = self.length, 0
        self._total: Tensor | None = None
        self._late: Tensor | float = 1.0
        self._ended = False

    # -- a batch ------------------------------------------------------------------------------------------------

    def batches(self, loader: Iterable[Any], *, last_epoch: bool = False) -> Iterator[Any]:
        """The batches of an epoch, each of which is begun; one batch is read ahead, so that the last is known.

        Args:
            loader: The batches.
            last_epoch: Whether no epoch comes after this one. With ``across_epochs``, its last batch ends the window.
        """
        ends = last_epoch or not self.windows.across_epochs
        left = _length(loader) if ends else None
        for batch, is_last in _with_last(loader):
            self.begin(left=left, ends=is_last and ends)
            yield batch
            left = None if left is None or left <= 1 else left - 1
        self.epoch += 1
        if not self.windows.across_epochs:
            self.drop()

    def begin(
        self, *, epoch: int | None = None, step: int | None = None, left: int | None = None, ends: bool = False
    ) -> None:
        """Begin a batch: see whether it is the window's first, and whether it is the last.

        Args:
            epoch: The epoch, counted from 0; default: as :meth:`batches` has counted.
            step: How many optimizer steps were made; default: as many as windows have ended.
            left: The number of batches, this one included, up to one that ends its window in any case (an epoch's, or
                the run's, last); None: unknown. If it is known, no gradient has to be multiplied for it afterwards.
            ends: Whether this batch ends its window in any case.
        """
        self.epoch = self.epoch if epoch is None else epoch
        self.step = self.step if step is None else step
        if self.position == 0:
            self.length = self._rest or self.windows.at(self.epoch, self.step)
            if left is not None:
                self.length = min(self.length, left)
            self._divisor, self._count, self._total = self.length, 0, None
        if ends:
            self.length = self.position + 1
        self._ended = False
        self.steps = self.position + 1 >= self.length

    def share(self, loss: Tensor, batch: Any, params: Iterable[Tensor]) -> Tensor:
        """The loss to call ``backward()`` of, which adds the batch's share to the gradients.

        Args:
            loss: The mean loss of the batch.
            batch: The batch, which is weighed.
            params: The parameters that are trained. If the batch ends the window, the gradients that they have are
                multiplied, unless they have the right factor already.

        Raises:
            ValueError, WrongTypeError: The batch has no weight, or one that is not valid.
        """
        self.contribute(loss, batch, params)
        return loss / self.length

    def contribute(self, loss: Tensor | None, batch: Any, params: Iterable[Tensor]) -> None:
        """Do as :meth:`share` does, and leave it to the caller to divide the loss by :attr:`length`.

        The loss keeps its value: what is multiplied is the gradient that comes to it.

        Args:
            loss: The mean loss of the batch; None: the batch contributes nothing, and does not count.
            batch: See :meth:`share`.
            params: See :meth:`share`.
        """
        weight: Tensor | float = 1.0
        if loss is not None:
            self._count += 1
            if self.weigh is not None:
                weight = self._weight(batch, loss.device)
                self._total = weight if self._total is None else self._total + weight
        if self.steps:
            self._end(params)
        if loss is not None:
            self._multiply(loss, weight)
        self._rest = self.resumed_at = 0
        self.position = 0 if self.steps else self.position + 1

    def again(self, loss: Tensor, batch: Any) -> None:
        """Give the loss of a batch that is evaluated again, for the same step, the factor that belongs to it."""
        self._multiply(loss, 1.0 if self.weigh is None else self._weight(batch, loss.device))

    def sync(self, model: Any) -> AbstractContextManager[Any]:
        """The context for a batch's forward and backward pass: ``model.no_sync()`` of DDP, unless the batch steps."""
        return nullcontext() if self.steps or not hasattr(model, "no_sync") else model.no_sync()

    # -- checkpoints --------------------------------------------------------------------------------------------

    @property
    def rest(self) -> int:
        """How many batches the open window still needs; 0 if none is open."""
        return self._rest or (self.length - self.position if self.position else 0)

    def state_dict(self) -> dict[str, Any]:
        """The state: counters, and the scale of the weights. Gradients are not in it."""
        position, length = self.position, self.length
        if self._rest:  # it was loaded, and no batch has come since
            position, length = self.resumed_at, self.resumed_at + self._rest
        reference = None if self._reference is None else self._reference.detach().clone()
        return {
            "epoch": self.epoch,
            "step": self.step,
            "position": position,
            "length": length,
            "reference": reference,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        A window that was open has lost the gradients of the batches that it had (:attr:`resumed_at` says how many): its
        step is made with those of the batches that are left, and at the batch at which it would have come anyway.
        """
        self.epoch, self.step, self._reference = state["epoch"], state["step"], state["reference"]
        self.drop()
        if state["position"]:
            self.resumed_at, self._rest = state["position"], state["length"] - state["position"]

    # -- ours ---------------------------------------------------------------------------------------------------

    def _weight(self, batch: Any, device: torch.device) -> Tensor:
        if isinstance(self.weigh, str):
            value = self._named(batch, self.weigh)
        else:
            assert self.weigh is not None  # noqa: S101 # callers have checked
            value = self.weigh(batch)
        dtype = torch.float32 if device.type == "mps" else torch.float64  # a window may have 2**24 tokens and more
        if not isinstance(value, Tensor):
            number = check_number(self.name, "the weight of a batch", value, NONNEGATIVE)
            return torch.tensor(number, dtype=dtype, device=device)
        value = check_number(self.name, "the weight of a batch", value.detach(), NONNEGATIVE, tensors=True)
        return value.reshape(()).to(device, dtype, non_blocking=True)

    def _named(self, batch: Any, name: str) -> Any:
        if isinstance(batch, Mapping):
            if name in batch:
                return batch[name]
            has = f"has the keys {', '.join(map(repr, batch))}"
        elif hasattr(batch, name):
            return getattr(batch, name)
        else:
            has = f"is a {type(batch).__name__} without such an attribute"
        raise ValueError(
            f"{self.name}: weigh={name!r}, and a batch {has}; valid: one of those, or a function of a batch"
        )

    def _end(self, params: Iterable[Tensor]) -> None:
        """Find the factors of the window, and multiply what was accumulated before its last batch."""
        early: Tensor | float = 1.0
        self._late, self._ended = 1.0, True
        if self.weigh is None:
            if self._count:
                early, self._late = self._divisor / self._count, self.length / self._count
        elif self._total is not None or self._in_processes:
            early, self._late = self._weighted_factors(params := list(params))
        if self.position:
            scale_gradients(params, early)
        self.step += 1

    def _weighted_factors(self, params: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What gradients of earlier batches, and the last batch's weight, are multiplied by."""
        total = self._total
        if total is None:  # none of this process's batches has a loss
            total = torch.zeros((), dtype=torch.float64, device=params[0].device)
        total, processes = self._summed(total)
        reference = torch.ones_like(total) if self._reference is None else self._reference.to(total)
        share = torch.where(total > 0, processes / total, 0.0)
        self._reference = _power_of_two(total / (processes * self.length), reference)
        return self._divisor * share * reference, self.length * share

    def _multiply(self, loss: Tensor, weight: Tensor | float) -> None:
        factor: Tensor | float
        if self._ended:
            factor = weight * self._late
        elif isinstance(weight, Tensor):
            # Relative to what batches weigh: times thousands of tokens, gradients of float16 would overflow. By a power
            # of two, which rounds nothing.
            if self._reference is None:
                total, processes = self._summed(weight)
                self._reference = _power_of_two(total / processes, torch.ones_like(total))
            factor = weight / self._reference.to(weight)
        else:
            factor = weight
        if loss.requires_grad and not (isinstance(factor, float) and factor == 1.0):
            loss.register_hook(lambda gradient: (gradient * factor).to(gradient.dtype))

    @property
    def _in_processes(self) -> bool:
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        return ready if self.distributed is None else self.distributed

    def _summed(self, number: Tensor) -> tuple[Tensor, int]:
        """The sum over all processes, and how many these are."""
        if not self._in_processes:
            return number, 1
        number = number.clone()
        torch.distributed.all_reduce(number)
        return number, torch.distributed.get_world_size()


@torch.no_grad()
def scale_gradients(params: Iterable[Tensor], factor: Tensor | float) -> None:
    """Multiply the gradients that parameters have, in place, without reading anything back from the device.

    Args:
        params: The parameters; the gradients of some may be sparse, divided over processes, or in host memory.
        factor: A number, or a tensor with one element.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> weight.grad = torch.ones(2)
    >>> scale_gradients([weight], torch.tensor(3.0))
    >>> weight.grad
    tensor([3., 3.])
    """
    if isinstance(factor, float) and factor == 1.0:
        return
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in dict.fromkeys(params):
        if (kept := getattr(p.grad, "kept", None)) is not None:  # a stand-in: the gradient has left for the host
            kept.multiply(factor)
        elif p.grad is not None:
            grad = local(p.grad)
            alike.setdefault((grad.device, grad.dtype), []).append(grad)
    for (device, dtype), grads in alike.items():
        short = dtype.itemsize < 4  # rounded to such a type, a factor could be off by half a percent
        if isinstance(factor, Tensor):
            factor_here: Any = factor.to(device, torch.float32 if short else dtype, non_blocking=True)
        else:
            factor_here = factor
        if not short:
            torch._foreach_mul_(grads, factor_here)
            continue
        for grad in grads:
            grad.copy_(grad.float().mul_(factor_here))


def _power_of_two(mean: Tensor, otherwise: Tensor) -> Tensor:
    """The power of two that is nearest to a number, or another number where that one is zero."""
    return torch.where(mean > 0, torch.exp2(torch.round(torch.log2(mean))), otherwise)


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _with_last(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """The batches, and whether each is the last."""
    iterator = iter(batches)
    try:
        batch = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield batch, False
        batch = following
    yield batch, True
