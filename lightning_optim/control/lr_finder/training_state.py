"""Copies of all that steps of a training change, to be put back bit for bit after steps that were only a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.control.replay.window import RandomStates
from lightning_optim.control.rollback.snapshots import Snapshots
from lightning_optim.control.rollback.step_snapshot import StepSnapshot, _put, _taken
from lightning_optim.control.rollback.undo import why_not_undone
from lightning_optim.control.schedules.learning_rates import all_groups, with_inner
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.stepping.shards import is_distributed

#: What torch keeps in a module's ``__dict__``, and is not a value of the user's. Hooks stay as they are.
_PARTS = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})


class TrainingState:
    """Copies of weights, buffers, attributes of modules, gradients, optimizer state, and random number generators.

    Copies of tensors are on the device of the tensors. Attributes of modules that are numbers, strings, tensors,
    and lists, tuples, deques and dicts of these are put back; of others, which object they are.

    Args:
        modules: The modules that are trained, and others that change with them, such as metrics.
        optimizers: The optimizers; those that they wrap are included.
        more: Returns further tensors that a step changes, such as masters, for each optimizer.

    Raises:
        MemoryError: There is no room for the copies.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        >>> state = TrainingState([layer], [optimizer])
        >>> layer(torch.rand(4, 2)).square().sum().backward()
        >>> optimizer.step()
        >>> state.put_back()
        >>> layer.weight.tolist(), layer.running_mean.tolist(), dict(optimizer.state), layer.weight.grad
        ([1.0, 1.0], [0.0, 0.0], {}, None)
        >>> state.release()
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        optimizers: Iterable[Optimizer],
        more: Callable[[Optimizer], Iterable[Tensor]] = lambda optimizer: (),
    ) -> None:
        self._parts = list({id(part): part for module in modules for part in module.modules()}.values())
        self._optimizers = list(optimizers)
        tensors: dict[int, Tensor] = {
            id(t): t for part in self._parts for t in part._parameters.values() if t is not None
        }
        tensors |= {id(p): p for o in self._optimizers for group in all_groups(o) for p in group["params"]}
        self._noise = RandomStates({t.device for t in tensors.values()})
        self._gradients = [(t, *_kept(t.grad)) for t in tensors.values()]
        try:
            for t in tensors.values():
                t.grad = None
            self._copy(more, tensors)
        except BaseException:
            self.put_gradients_back()
            raise

    def _copy(self, more: Callable[[Optimizer], Iterable[Tensor]], tensors: dict[int, Tensor]) -> None:
        self._steps = [_optimizer_state(optimizer, more) for optimizer in self._optimizers]
        stepped = {id(p) for o in self._optimizers for group in all_groups(o) for p in group["params"]}
        # With FSDP2, a module's parameters are sometimes its shards, and sometimes whole, temporary weights.
        others = () if any(map(is_distributed, tensors.values())) else tensors.values()
        # Those of the optimizer's parameters that do not require gradients are in no copy of its.
        self._tensors = [t for t in others if id(t) not in stepped or not t.requires_grad]
        self._buffers = [dict(part._buffers) for part in self._parts]
        self._tensors += [b for buffers in self._buffers for b in buffers.values() if b is not None]
        self._leaves: list[Tensor] = []
        self._attributes = [_taken(_own(part), self._leaves, None) for part in self._parts]
        self._copies = Snapshots(lambda: list(filter(_is_writable, _once([*self._tensors, *self._leaves]))))
        self._copies.begin(background=False)

    @torch.no_grad()
    def put_back(self) -> None:
        """Put everything back, each part whatever becomes of the others."""
        with ExitStack() as all_of_them:
            all_of_them.callback(self._noise.put_back)  # the last one
            all_of_them.callback(self.put_gradients_back)
            all_of_them.callback(self._copies.restore)
            all_of_them.callback(self._put_attributes_back)
            for put_back, _ in self._steps:
                all_of_them.callback(put_back)

    @torch.no_grad()
    def put_gradients_back(self) -> None:
        """Put the gradients back alone."""
        for tensor, gradient, copy in self._gradients:
            if copy is not None:
                gradient.copy_(copy)
            tensor.grad = gradient

    def release(self) -> None:
        """Free the copies."""
        self._copies.release()
        for _, release in self._steps:
            release()
        self._tensors, self._leaves, self._gradients, self._attributes, self._buffers = [], [], [], [], []

    def _put_attributes_back(self) -> None:
        for part, buffers, attributes in zip(self._parts, self._buffers, self._attributes, strict=True):
            part._buffers.clear()
            part._buffers.update(buffers)
            values = vars(part)
            for name in _own(part).keys() - attributes.keys():
                del values[name]
            for name, then in attributes.items():
                values[name] = _put(then, values.get(name), self._leaves)


def _kept(gradient: Tensor | None) -> tuple[Any, Tensor | None]:
    """A gradient, and a copy of it if it is a part of a larger buffer, which others write to, as DDP may."""
    if gradient is None or not gradient._is_view():
        return gradient, None
    return gradient, gradient.detach().clone()


def _optimizer_state(
    optimizer: Optimizer, more: Callable[[Optimizer], Iterable[Tensor]]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Copy an optimizer's weights and state; returns what puts them back, and what frees the copies."""
    attributes = [(one, _primitives(one)) for one in with_inner(optimizer) if not isinstance(one, RuleOptimizer)]

    def put_attributes_back() -> None:
        for one, then in attributes:
            for name in _primitives(one).keys() - then.keys():
                del vars(one)[name]
            vars(one).update(then)

    if why_not_undone(optimizer) is None:
        try:
            steps = StepSnapshot(optimizer, lambda: more(optimizer))
            steps.begin(background=False)
        except TypeError:  # its state has objects of its own
            pass
        else:

            def put_snapshot_back() -> None:
                steps.restore()
                put_attributes_back()

            return put_snapshot_back, steps.release
    # What it keeps elsewhere than in its state is known to its own `state_dict` alone.
    saved = deepcopy(optimizer.state_dict())
    params = _once([*(p for group in all_groups(optimizer) for p in group["params"]), *more(optimizer)])
    weights = Snapshots(lambda: params)
    weights.begin(background=False)

    def put_state_dict_back() -> None:
        optimizer.load_state_dict(saved)
        weights.restore()
        put_attributes_back()

    return put_state_dict_back, weights.release


def _primitives(optimizer: Optimizer) -> dict[str, Any]:
    """The attributes of an optimizer that count something, say, and are no part of its state."""
    return {
        name: value
        for name, value in vars(optimizer).items()
        if value is None or type(value) in (bool, int, float, complex, str)
    }


def _own(part: nn.Module) -> dict[str, Any]:
    """The attributes of a module, apart from what torch keeps there."""
    return {name: value for name, value in vars(part).items() if name not in _PARTS and not name.endswith("_hooks")}


def _once(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _is_writable(tensor: Tensor) -> bool:
    """Whether a tensor can be written to, and so may have changed: not one of an inference, or an expanded one."""
    if tensor.is_inference() or tensor.layout is not torch.strided or tensor.device.type == "meta":
        return False
    return not any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def loss_of(output: Any) -> Any:
    """The loss in what a training step has returned; None if there is none."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, Tensor):
        return loss.detach() if loss.numel() == 1 else None
    return loss if isinstance(loss, int | float) else None
