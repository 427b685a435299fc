"""How many bytes a training needs: weights, gradients, the optimizer's state, and its float32 masters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.placement.state_size import Sizes, State, bytes_of, name_of, option_of
from lightning_optim.stepping.shards import is_distributed, local

#: A callable that makes an optimizer from parameters: a class, or a ``functools.partial`` of one with its options.
Maker = Callable[[Iterable[Any]], Optimizer]


@dataclass(frozen=True)
class Footprint:
    """Bytes of one whole training, before they are divided over processes.

    Attributes:
        optimizer: The optimizer's name.
        parameters: Number of weights that are trained.
        weights: Bytes of all weights and buffers, the frozen ones too.
        trained: Bytes of the weights that the optimizer steps, in their own type.
        gradients: Bytes of all gradients.
        masters: Bytes of the masters of a detached step.
        copies: Bytes of the new weights that a detached step writes beside its masters, where their types differ.
        state: The optimizer's state in graph, which is for the weights.
        master_state: The optimizer's state in a detached step, which is for the masters.
        traffic: Bytes that a step in graph moves: each tensor once for each time that the rule reads or writes it.
        master_traffic: The same for a detached step, its gradients and copies included.
        workspace: Further device memory that a step in graph allocates and frees.
        detached_workspace: Further device memory that a detached step allocates and frees.
        history: How many past steps the optimizer keeps, each as two vectors of the masters' size; 0: none.
        wide_masters: Whether masters in float64 are wanted for narrower weights.
        needs_closure: Whether the optimizer evaluates the loss itself, as a line search does.
        by_rule: Whether the optimizer has a rule that our engines can step.
        in_buckets: Whether a detached step can be done bucket by bucket, rather than by the optimizer's own step.
        undoable: Whether a detached step can be undone.
        clips: Whether the optimizer clips by the global norm itself (``max_grad_norm``).
        divided: Whether the parameters are divided over processes already (DTensors): bytes are then of one part.
        notes: What was not counted.
    """

    optimizer: str
    parameters: int
    weights: int
    trained: int
    gradients: int
    masters: int
    copies: int
    state: State
    master_state: State
    traffic: int
    master_traffic: int
    workspace: int = 0
    detached_workspace: int = 0
    history: int = 0
    wide_masters: bool = False
    needs_closure: bool = False
    by_rule: bool = False
    in_buckets: bool = False
    undoable: bool = False
    clips: bool = False
    divided: bool = False
    notes: tuple[str, ...] = ()

    @property
    def needs_host(self) -> str | None:
        """Why the step must run on the host, by the golden rule; None if it need not."""
        if self.history:
            return (
                f"{self.optimizer} keeps {self.history} past steps, {2 * self.history} vectors of the model's size, "
                "which only host memory has room for"
            )
        if self.needs_closure:
            return (
                f"{self.optimizer} evaluates the loss itself and decides by it (a line search, say): control flow that "
                "a step in the device's queue cannot have"
            )
        if self.wide_masters:
            return "masters in float64 are wanted for narrower weights, and a step in place has no masters"
        return None


def footprint(
    model: nn.Module | Iterable[Tensor], optimizer: Optimizer | Maker, *, master_dtype: torch.dtype = torch.float32
) -> Footprint:
    """The bytes of a training with this model and optimizer; nothing is allocated.

    The state's size is known from the rules of our optimizers and of torch's SGD, Adam and AdamW. Other optimizers may
    have a method ``state_bytes`` or an option ``history_size`` that tells it. For all others, an optimizer of the same
    class and options is made on the meta device and stepped there once. If that fails, the state that the optimizer has
    is measured; if it has none, the size is an estimate.

    Args:
        model: The module, or its parameters. They may be on the meta device, and sharded (DTensors).
        optimizer: The optimizer of these parameters, or a callable that makes one from parameters, such as a class or
            a ``functools.partial``.
        master_dtype: Type of the detached step's masters: float32 or float64.

    Raises:
        ValueError: ``master_dtype`` is another type, or no parameter is trained.

    >>> from lightning_optim import AdamW
    >>> layer = nn.Linear(1000, 1000, bias=False, dtype=torch.bfloat16, device="meta")
    >>> needs = footprint(layer, AdamW)
    >>> needs.weights, needs.gradients, needs.state.bytes, needs.masters
    (2000000, 2000000, 8000004, 4000000)
    """
    if master_dtype not in (torch.float32, torch.float64):
        raise ValueError(f"footprint: master_dtype={master_dtype}; valid: torch.float32, torch.float64")
    made = optimizer if isinstance(optimizer, Optimizer) else _made(model, optimizer)
    trained = [p for group in made.param_groups for p in group["params"] if p.requires_grad]
    if not trained:
        raise ValueError(f"footprint: of the parameters of {type(made).__name__}, no parameter requires a gradient")
    if isinstance(model, nn.Module):
        weights = [*model.parameters(), *model.buffers()]
        with_gradient = [p for p in model.parameters() if p.requires_grad]
    else:
        weights = with_gradient = trained
    masters = [(p, torch.empty_like(local(p), dtype=_wide(p, master_dtype), device="meta")) for p in trained]
    copies = sum(bytes_of(p) for p, master in masters if p.dtype != master.dtype)
    sizes = Sizes(made, dict(masters))
    history = option_of(made, "history_size")
    # Optimizers such as SAM keep a copy of the weights while these are perturbed.
    perturbed = sum(map(bytes_of, trained)) if callable(getattr(made, "perturb", None)) else 0
    matrices, workspace = sizes.matrices()
    notes = []
    if perturbed:
        notes.append(f"{name_of(made)} evaluates the model twice in a step: the second time is not counted")
    if matrices:
        notes.append(
            f"{name_of(made)}: neither time nor memory of its matrix products is counted, but for the directions"
        )
    return Footprint(
        optimizer=name_of(made),
        parameters=sum(local(p).numel() for p in trained),
        weights=sum(map(bytes_of, weights)),
        trained=sum(map(bytes_of, trained)),
        gradients=sum(map(bytes_of, with_gradient)),
        masters=sum(bytes_of(master) for _, master in masters),
        copies=copies,
        state=sizes.state(on_masters=False),
        master_state=sizes.state(on_masters=True),
        traffic=sizes.traffic(on_masters=False),
        master_traffic=sizes.traffic(on_masters=True) + copies,
        # In graph, the directions of all matrices exist at once; in a detached step, those of one bucket.
        workspace=perturbed + workspace,
        detached_workspace=perturbed,
        history=0 if history is None else int(history),
        wide_masters=master_dtype == torch.float64 and any(p.dtype.to_real() != torch.float64 for p in trained),
        needs_closure=_needs_closure(made),
        by_rule=sizes.by_rule,
        in_buckets=sizes.in_buckets(),
        undoable=sizes.undoable(master_dtype),
        clips=getattr(getattr(made, "options", None), "max_grad_norm", None) is not None,
        divided=any(map(is_distributed, trained)),
        notes=tuple(notes),
    )


def _made(model: nn.Module | Iterable[Tensor], make: Maker) -> Optimizer:
    """An optimizer over stand-ins of the parameters on the meta device."""
    cls = make.func if isinstance(make, partial) else make
    ours = getattr(cls, "__module__", "").startswith("lightning_optim")
    named = model.named_parameters() if isinstance(model, nn.Module) else (("", p) for p in model)
    pairs = [(name, p) for name, p in named if p.requires_grad]
    if not pairs:
        raise ValueError("footprint: no parameter requires a gradient")
    stand_ins = [(name, nn.Parameter(torch.empty_like(p, device="meta"))) for name, p in pairs]
    # Our optimizers may tell parameters apart by their names.
    return make(stand_ins if ours and isinstance(model, nn.Module) else [p for _, p in stand_ins])


def _needs_closure(optimizer: Optimizer) -> bool:
    declared = getattr(optimizer, "needs_closure", None)
    if declared is not None:
        return bool(declared)
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _wide(p: Tensor, master: torch.dtype) -> torch.dtype:
    """The type of a parameter's master: never narrower than the weight itself."""
    real = torch.promote_types(p.dtype.to_real(), master)
    return real.to_complex() if p.is_complex() else real
