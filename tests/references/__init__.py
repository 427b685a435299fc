"""Every optimizer again, from its paper or torch's documentation, in plain float64: what the engines are held against.

One file for each, with the optimizer's name. Nothing in them uses the package's rules. A file has

- ``update(p, g, s, o)``: what is subtracted from the weight ``p``, whose gradient is ``g``. The state ``s`` is empty
  before the first step, and updated in place, by the keys of the ``state_dict``; ``o`` are the options of the param
  group. A pair in its place is the step's effective size, by which decay goes too, and the direction;
- or, if parameters have something in common, ``updates(ps, gs, ss, os)``, with a list of each;
- ``DECAY``: how ``weight_decay`` is applied unless ``decoupled_weight_decay`` says otherwise; ``"none"``: by the rule;
- ``BASE``: options of every case but the first, whose options are the class's own defaults;
- ``VARIANTS``: cases of this optimizer, beside :data:`SHARED`, which all have.

And if there is need:

- ``INPUTS``: names of what a step takes beside the gradient; ``update`` has them as keywords;
- ``EVERYWHERE``: slots that have one value for all parameters;
- ``WEIGHTS``: slots that begin as the weight, and so are as large as it in the first step;
- ``TWIN_TAKES_EMPTY``: False if torch's own class fails with tensors that have no elements;
- ``MIXES``: by how many roundings of its largest number a slot may be off, where it is mixed of all elements;
- ``spread(o)``: by how many roundings of a weight's largest change a step may be off (matrices mix all elements);
- ``evaluate(p, s, o)``: the weights for evaluation.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from lightning_optim.engines import ENGINES
from lightning_optim.registry import OPTIMIZERS

from .shared import Options, State, Update, cautious, clip_coefficient

__all__ = [
    "BASE",
    "FASTEST",
    "NAMES",
    "REFERENCES",
    "REPRESENTATIVES",
    "SHARED",
    "TELLING",
    "Reference",
    "cases",
    "clip_coefficient",
    "common_to_all",
    "representative",
    "step",
    "step_all",
]


@dataclass(frozen=True)
class Reference:
    """What a file says of its optimizer; see the top of this file."""

    decay: str
    base: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    updates: Callable[..., Sequence[Update]]
    inputs: tuple[str, ...] = ()
    everywhere: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    twin_takes_empty: bool = True
    mixes: float = 0.0
    spread: Callable[[Options], float] = field(default=lambda o: 0.0)
    evaluate: Callable[[Tensor, State, Options], Tensor] | None = None

    @classmethod
    def of(cls, file: ModuleType) -> Reference:
        optional = {name: getattr(file, name) for name in ("spread", "evaluate") if hasattr(file, name)}
        return cls(
            decay=file.DECAY,
            base=file.BASE,
            variants=file.VARIANTS,
            updates=file.updates if hasattr(file, "updates") else _each(file.update),
            inputs=getattr(file, "INPUTS", ()),
            everywhere=getattr(file, "EVERYWHERE", ()),
            weights=getattr(file, "WEIGHTS", ()),
            twin_takes_empty=getattr(file, "TWIN_TAKES_EMPTY", True),
            mixes=getattr(file, "MIXES", 0.0),
            **optional,
        )


def _each(update: Callable[..., Update]) -> Callable[..., list[Update]]:
    def updates(*columns: Sequence[Any], **inputs: Sequence[Any]) -> list[Update]:
        rows = zip(*columns, strict=True)
        return [update(*row, **{name: xs[i] for name, xs in inputs.items()}) for i, row in enumerate(rows)]

    return updates


_FILES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py") if path.stem != "shared")
REFERENCES = {name: Reference.of(importlib.import_module(f".{name}", __name__)) for name in _FILES}

#: Optimizers that are held against a reference: all, unless a file is missing, which one test says.
NAMES = [name for name in OPTIMIZERS if name in REFERENCES]

#: One optimizer of each kind. What all have in common is tested on these by default, and on all under ``--matrix``.
REPRESENTATIVES = {
    "sgd": "element-wise, with a slot that an option switches",
    "adamw": "element-wise, with a counter",
    "lamb": "with norms of its tensor",
    "muon": "whole matrices, and another rule beside",
}


def representative(name: str) -> bool:
    return name in REPRESENTATIVES


#: For tests of what all optimizers have in common.
common_to_all = pytest.mark.matrix(unless=representative)

#: The engine that most cases run on by default: the fastest that there is here.
FASTEST = "foreach" if ENGINES["host"].unavailable() else "host"

BASE = {name: reference.base for name, reference in REFERENCES.items()}

#: Cases of every optimizer that has the options; ``decoupled_weight_decay`` is the other way round from its default.
SHARED: dict[str, dict[str, Any]] = {
    "weight_decay": {"weight_decay": 0.1},
    "other_decay": {"weight_decay": 0.1, "decoupled_weight_decay": None},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "cautious": {"cautious": True, "weight_decay": 0.1},
    "clip": {"max_grad_norm": 0.5, "weight_decay": 0.1},
    "clip_cautious": {"max_grad_norm": 0.5, "cautious": True, "maximize": True},
    "bfloat16_state": {"state_dtype": "bfloat16"},
}


def cases(name: str) -> dict[str, dict[str, Any]]:
    """The option sets with which an optimizer is tested, by name."""
    signature = inspect.signature(OPTIMIZERS[name].cls).parameters
    table: dict[str, dict[str, Any]] = {"default": {}}
    for case, options in {**SHARED, **REFERENCES[name].variants}.items():
        if set(options) <= set(signature):
            table[case] = {**BASE[name], **options}
            if "decoupled_weight_decay" in options:
                table[case]["decoupled_weight_decay"] = not signature["decoupled_weight_decay"].default
    return table


#: Of the cases in :data:`SHARED`, those that have most in them.
TELLING = ("default", "clip_cautious", "bfloat16_state")


def decay_of(name: str, o: Options) -> str:
    """How an optimizer with these options decays its weights."""
    decoupled = o.get("decoupled_weight_decay")
    if name == "adamw" or decoupled is None:  # AdamW stays AdamW, whatever torch.optim.Adam's state says
        return REFERENCES[name].decay
    return "decoupled" if decoupled else "l2"


def step(
    name: str, p: Tensor, g: Tensor, s: State, o: Options, *, kind: str | None = None, **inputs: Tensor
) -> tuple[Tensor, State]:
    """One step of one weight: see :func:`step_all`."""
    ((p, s),) = step_all(name, [p], [g], [s], [o], kind=kind, inputs={key: [x] for key, x in inputs.items()})
    return p, s


def step_all(
    name: str,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    states: Sequence[State],
    options: Sequence[Options],
    *,
    kind: str | None = None,
    inputs: Mapping[str, Sequence[Tensor | None]] | None = None,
) -> list[tuple[Tensor, State]]:
    """One step in float64.

    Args:
        name: The optimizer.
        weights: All of its weights.
        gradients: Theirs, clipped; None is no step of this weight.
        states: Theirs: empty before the first step; the keys of the ``state_dict``.
        options: Of the param group of each.
        kind: The kind of weight decay; default: the optimizer's own.
        inputs: What the step takes beside gradients.

    Returns:
        The new weights and the new states.
    """
    reference = REFERENCES[name]
    new = [(p, dict(s)) for p, s in zip(weights, states, strict=True)]
    stepped = [i for i, g in enumerate(gradients) if g is not None]
    kinds = [decay_of(name, options[i]) if kind is None else kind for i in stepped]
    seen = [_seen(of, new[i][0], gradients[i], options[i]) for i, of in zip(stepped, kinds, strict=True)]
    updates = reference.updates(
        [p for p, _ in seen],
        [g for _, g in seen],
        [new[i][1] for i in stepped],
        [options[i] for i in stepped],
        **{key: [xs[i] for i in stepped] for key, xs in (inputs or {}).items()},
    )
    for i, of, (_, g), update in zip(stepped, kinds, seen, updates, strict=True):
        new[i] = _moved(of, new[i][0], g, update, options[i]), new[i][1]
    for i in {*range(len(new))} - {*stepped}:
        new[i][1].update({key: new[stepped[0]][1][key] for key in reference.everywhere if stepped and key in new[i][1]})
    return new


def _seen(kind: str, p: Tensor, g: Tensor | None, o: Options) -> tuple[Tensor, Tensor]:
    """The weight, before decay, and the gradient that the rule sees."""
    assert g is not None
    g = -g if o.get("maximize") else g
    return p, g + o["weight_decay"] * p if kind == "l2" else g


def _moved(kind: str, p: Tensor, g: Tensor, update: Update, o: Options) -> Tensor:
    """The new weight."""
    size, change = (float(o["lr"]), update) if isinstance(update, Tensor) else (update[0], update[0] * update[1])
    if o.get("cautious"):
        change = cautious(change, g)
    shrink = size * o["weight_decay"] if kind in ("decoupled", "after", "proximal") else 0.0
    if kind == "after":
        return (p - change) * (1 - shrink)
    return p - shrink * p - change if kind == "decoupled" else (p - change) / (1 + shrink)
