"""What happens around a rule, in the rule's own language, so that rule and policy are one Program.

Unscale and clip, maximize, weight decay, the cautious mask, rounding and the store are independent of which rule
runs; :func:`wrap` puts them around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch

from lightning_optim.rules.ops import maximum, mean, noise_key, round_to, sign, stochastic_round
from lightning_optim.rules.program import Program, Rate
from lightning_optim.rules.rule import Rule, Step
from lightning_optim.rules.slots import Slot
from lightning_optim.rules.trace import trace

Decay = Literal["none", "l2", "decoupled", "after", "proximal"]
Rounding = Literal["nearest", "stochastic", "kahan"]
DECAYS: tuple[Decay, ...] = ("none", "l2", "decoupled", "after", "proximal")
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic", "kahan")
KAHAN_SLOT = "kahan_compensation"
#: Prefix of a tensor's name: names the tensor that gets the old value, so that the step can be undone.
UNDO = "undo_"
#: Prefix of an observation's name: names the one-number tensor that gets the observed value.
OBSERVED = "observed_"

# The floor of the cautious mask's mean, as in the authors' code (kyleliang919/C-Optim): a tensor in which almost
# every sign disagrees must not take a thousandfold step.
_CAUTION_FLOOR = 1e-3


@dataclass(frozen=True)
class Policy:
    """Everything about a step that is not the rule.

    Args:
        decay: ``"l2"`` adds ``weight_decay * p`` to the gradient; ``"decoupled"`` multiplies the weight by
            ``1 - lr * weight_decay`` before the update (AdamW), ``"after"`` after it (SOAP); ``"proximal"`` divides it
            by ``1 + lr * weight_decay`` after the update (Adan); ``"none"``. Where a rule returns a
            :class:`~lightning_optim.rules.rule.Step`, its size stands for ``lr``.
        cautious: Zero the update where its sign disagrees with the gradient's, and rescale the rest by the inverse
            of the kept share (Cautious Optimizers, arXiv:2411.16085).
        maximize: Negate the gradient, so that the objective is maximized.
        scaled: Multiply the gradient by the scalar ``grad_scale`` (unscaling and clipping; the gradient in memory
            is not changed).
        rounding: How a weight stored in fewer bits than the math is written: ``"nearest"``; ``"stochastic"``
            (bfloat16; unbiased, also for bfloat16 slots); ``"kahan"`` (one more slot holds the lost part).
        weight_dtype: Name of the weight's storage type, when ``rounding`` needs to know it.
        low_precision_slots: The slots stored as bfloat16.
        copy: Also write the new weight to a tensor named ``copy``, rounded to its storage type.
        undo: Also write the old values of the weight and of each slot to tensors named ``undo_p``, ``undo_<slot>``.
        direction: Write the rule's update to ``copy`` instead, and leave the weight alone: a transform of whole
            matrices and another rule come next.
        observe: Write what the rule observes to tensors named ``observed_<name>``, one number each.

    Raises:
        ValueError: An unknown decay or rounding.
    """

    decay: Decay = "none"
    cautious: bool = False
    maximize: bool = False
    scaled: bool = False
    rounding: Rounding = "nearest"
    weight_dtype: str = "float32"
    low_precision_slots: tuple[str, ...] = ()
    copy: bool = False
    undo: bool = False
    direction: bool = False
    observe: bool = False

    def __post_init__(self) -> None:
        """Check the names."""
        if self.decay not in DECAYS:
            raise ValueError(f"decay={self.decay!r}; valid: {', '.join(DECAYS)}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding={self.rounding!r}; valid: {', '.join(ROUNDINGS)}")

    @property
    def rounds(self) -> bool:
        """Whether the weight is stored in fewer bits than the math has, so that ``rounding`` matters."""
        return self.weight_dtype in ("bfloat16", "float16")


@dataclass(frozen=True)
class Update:
    """A rule with its policy: what an engine runs.

    Attributes:
        rule: The mathematics.
        policy: What happens around the rule.
        flags: Values of the rule's flags, as sorted pairs.
    """

    rule: Rule
    policy: Policy
    flags: tuple[tuple[str, bool], ...] = ()
    slots: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Derive the slots."""
        slots = tuple(name for name in self.rule.slots_under(dict(self.flags)) if name not in self.shared_slots)
        if self.policy.rounding == "kahan" and self.policy.rounds:
            slots += (KAHAN_SLOT,)
        object.__setattr__(self, "slots", slots)

    @property
    def shared_slots(self) -> tuple[str, ...]:
        """The slots that all parameters of an optimizer have in common: engines do not see them."""
        return tuple(name for name in self.rule.slots_under(dict(self.flags)) if self.rule.slots[name].rate == "shared")

    @cached_property
    def meets(self) -> bool:
        """Whether the parameters of an optimizer have something in common, so that they must be stepped together."""
        return bool(self.rule.shares or self.rule.every or self.rule.inputs or self.program.phases)

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors that come from outside, besides the gradient."""
        return self.rule.inputs_under(dict(self.flags))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors of one parameter, in the order of the calling convention."""
        return ("p", "g", *self.slots, *self.inputs, *self.outputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the tensors that are only written."""
        undo = tuple(UNDO + name for name in ("p", *self.slots)) if self.policy.undo else ()
        return (("copy",) if self.policy.copy else ()) + undo + self.observations

    @cached_property
    def observations(self) -> tuple[str, ...]:
        """Names of the tensors that get what the rule observes."""
        return tuple(OBSERVED + name for name in self.rule.observe) if self.policy.observe else ()

    def slot(self, name: str) -> Slot:
        """The declaration of a slot."""
        return self.rule.slots.get(name, _PLAIN)

    def is_elementwise(self, tensor: str) -> bool:
        """Whether a tensor of the calling convention has one number for each element of the weight."""
        return tensor not in self.observations and self.slot(tensor.removeprefix(UNDO)).is_plain

    def shape_of(self, tensor: str, weight: torch.Size) -> torch.Size:
        """The shape of a tensor of the calling convention, for a weight of this shape."""
        return torch.Size(()) if tensor in self.observations else self.slot(tensor.removeprefix(UNDO)).shape_for(weight)

    @cached_property
    def program(self) -> Program:
        """The traced form."""
        rates = {name: _RATES[self.slot(name).rate] for name in (*self.slots, *self.shared_slots)}
        rates |= {UNDO + name: rate for name, rate in rates.items()} | dict.fromkeys(self.observations, Rate.SCALAR)
        scalars = dict.fromkeys((*self.rule.scalars, "lr", "weight_decay", "grad_scale", "seed", "tensor_id", "step"))
        program = trace(
            self.run,
            tensors=(*self.tensors, *self.shared_slots),
            scalars=scalars,
            name=self.rule.name,
            rates=rates,
            shared=self.rule.shared,
        )
        if "step" not in program.scalars and (self.rule.counts_steps or program.counts_steps):
            # Only totals need the counter, or nothing does (as in some of torch's classes): it advances all the same.
            return replace(program, scalars=(*program.scalars, "step"))
        return program

    def run(self, **values: Any) -> dict[str, Any]:
        """The new value of each tensor that is written, from the tensors and scalars by name."""
        policy = self.policy
        p, g = values["p"], values["g"]
        if policy.scaled:
            g = g * values["grad_scale"]
        if policy.maximize:
            g = -g
        if policy.decay == "l2":
            g = g + values["weight_decay"] * p
        given = {
            name: values[name]
            for name in self.rule.positional
            if name in self.slots or name in self.shared_slots or name in self.inputs
        }
        # This comes first: an engine whose values are the tensors themselves must save them before it overwrites them.
        old = {UNDO + name: values[name] for name in ("p", *self.slots)} if policy.undo else {}
        shrinks = policy.decay in ("decoupled", "after", "proximal")
        shrink = values["lr"] * values["weight_decay"] if shrinks else 0.0
        base = p * (1 - shrink) if policy.decay == "decoupled" else p
        update, stores = self.rule(p, g, given, values, dict(self.flags))
        observed: Mapping[str, Any] = {}
        if isinstance(update, Step):
            shrink = update.size * values["weight_decay"] if shrinks else 0.0
            base = p * (1 - shrink) if policy.decay == "decoupled" else p
            update, observed = update.size * update.direction, update.observe
        if policy.cautious:
            # A product, not a selection, so that a NaN does not become a harmless zero; and a product of signs, since
            # that of the numbers may be too small for float32.
            kept = maximum(sign(update) * sign(g), 0.0)
            update = update * kept / maximum(mean(kept), _CAUTION_FLOOR)
        if policy.direction:
            new = update
        elif KAHAN_SLOT in self.slots:
            # Not `base - p - update`: the difference of two close numbers would lose the small decay.
            change = -update
            if policy.decay == "decoupled":
                change = -(shrink * p) - update
            elif policy.decay == "after":
                change = -(shrink * (p - update)) - update
            elif policy.decay == "proximal":
                change = -(update + shrink * p) / (1 + shrink)
            change = change + values[KAHAN_SLOT]
            new = round_to(p + change, policy.weight_dtype)
            stores[KAHAN_SLOT] = change - (new - p)
        else:
            new = base - update
            if policy.decay == "after":
                new = new * (1 - shrink)
            elif policy.decay == "proximal":
                new = new / (1 + shrink)
        if policy.rounding == "stochastic":
            stores = {
                name: self._dither(values, value, salt) if name in policy.low_precision_slots else value
                for salt, (name, value) in enumerate(stores.items(), start=1)
            }
            if policy.rounds and not policy.direction:
                new = self._dither(values, new, 0)
        if not policy.direction:
            stores["p"] = new
        if policy.copy:
            stores["copy"] = new
        if policy.observe:
            stores |= {OBSERVED + name: value for name, value in observed.items()}
        return old | stores

    @staticmethod
    def _dither(values: Mapping[str, Any], value: Any, salt: int) -> Any:
        key = noise_key(values["seed"], values["tensor_id"], values["step"], salt)
        return stochastic_round(value, key)


_PLAIN = Slot()

_RATES: dict[str, Rate] = {
    "element": Rate.ELEMENT,
    "row": Rate.ROW,
    "column": Rate.COLUMN,
    "scalar": Rate.SCALAR,
    "shared": Rate.SHARED,
}
