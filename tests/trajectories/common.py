"""What the tests of the trajectories share: weights and gradients, and the judge of each step.

Engines round differently (fused multiply-adds, the order of a sum), so a step is compared with an interval. The
reference makes the same step in float64, from the very weights and state that the engine started from. Its result
may differ from the engine's by

- ``ROUNDINGS`` roundings of the math type, relative to the old or the new value, whichever is larger: the longest
  chain of operations from memory to a result is some 15 long (Adam: three for each average, square root, quotient,
  sum with eps, quotient, product with the step size, cast of a scalar where it enters, decay,
  difference);
- what the reference itself changes by when the gradient moves by ``WIGGLE`` roundings: this allows the other side
  of a discontinuity (Lion's sign, the cautious mask) to the elements that lie on it, and to no others.

- as many roundings of the weight's largest change as the reference's ``spread`` says (of matrices).

Both ends of the interval are then rounded to the storage type. Rounding is monotonic, so a bfloat16 weight must be
*the* rounded reference, unless that lies within the bound of a tie.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import references
import torch
from torch import Tensor, nn

from lightning_optim.engines import ENGINES
from lightning_optim.optimizers import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.rules.policy import KAHAN_SLOT, Decay
from lightning_optim.stepping.options import REAL

#: What a step takes beside the gradient: by its name, for each parameter.
Inputs = Mapping[str, Mapping[Tensor, Tensor]]

ROUNDINGS = 16
WIGGLE = 8
STEPS = 50

NO_COMPILER = ENGINES["host"].unavailable()
ENGINE_NAMES = [
    "eager",
    "foreach",
    pytest.param("host", marks=pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))),
]
ALL_CASES = [(name, case) for name in references.NAMES for case in references.cases(name)]
ENGINE = pytest.mark.parametrize("engine", ENGINE_NAMES)
OPTIMIZER = pytest.mark.parametrize("name", references.NAMES)


def supported(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that an optimizer has."""
    return {option: value for option, value in options.items() if option in OPTIMIZERS[name].options}


def group_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
    """The param group of a parameter."""
    return next(group for group in optimizer.param_groups if any(p is q for q in group["params"]))


def known_of(p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """What a reference may ask of a parameter beside the options: its type, and whether real numbers are pairs."""
    return {**group, "weight_dtype": p.dtype, "is_complex": p.is_complex()}


def made(optimizer: RuleOptimizer, p: Tensor) -> dict[str, Tensor]:
    """What a step has left of a parameter's state, as it is stored: a reference may go on from what is not unique."""
    state = optimizer.state.get(p, {}).items()
    return {key: torch.view_as_real(value) if value.is_complex() else value.clone() for key, value in state}


def takes_complex(name: str) -> bool:
    """Whether an optimizer steps complex weights."""
    return REAL not in OPTIMIZERS[name].cls.needs


def running_engines() -> list[str]:
    return [name for name, engine in ENGINES.items() if engine.unavailable() is None]


def weights(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    """Small tensors of all kinds that are dense in memory."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    return [
        nn.Parameter(normal(2, 3, 3, 2).to(memory_format=torch.channels_last)),
        nn.Parameter(normal()),
        nn.Parameter(normal(0)),
        nn.Parameter(normal(5, 3).t()),
        nn.Parameter(normal(1)),
        nn.Parameter(normal(3, 1, 7)),
        nn.Parameter(normal(17)),
        nn.Parameter(torch.zeros(2, 2, dtype=dtype)),  # without a norm
    ]


@cache
def normal_with_zeros(shape: torch.Size, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    g = torch.randn(shape, generator=random, dtype=torch.float64)
    g[torch.rand(shape, generator=random) < 0.1] = 0.0
    return g


def gradient(p: Tensor, step: int, index: int, scale: float = 1.0) -> Tensor:
    """A gradient with strides of its own, others every few steps: contiguous, as the weight's, or expanded."""
    g = scale * normal_with_zeros(p.shape, 1000 * step + index)
    form = (step // 4 + index) % 3
    if form == 1:
        return torch.empty_like(p, requires_grad=False).copy_(g)
    if form == 2 and p.ndim == 1 and p.numel() > 1:
        return g[:1].to(p.dtype).expand(p.shape)
    return g.to(p.dtype)


def inputs_of(name: str, params: Sequence[Tensor], step: int) -> Inputs:
    """What a step of an optimizer takes beside the gradient."""

    def values(place: int) -> dict[Tensor, Tensor]:
        return {p: normal_with_zeros(p.shape, 1000 * step + place + i).to(p.dtype) for i, p in enumerate(params)}

    return {given: values(100 * place) for place, given in enumerate(references.REFERENCES[name].inputs, start=1)}


def take_step(optimizer: RuleOptimizer, inputs: Inputs) -> None:
    """A step, with the inputs, if it takes any."""
    if not inputs:
        optimizer.step()
        return
    with torch.no_grad():
        step: Callable[..., Any] = optimizer._stepper.step
        step(inputs=inputs)


def give_gradients(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    """Set the gradients of a step; now and then a parameter has none, for two steps."""
    for index, p in enumerate(params):
        p.grad = None if (step // 2 + index) % 11 == 5 else gradient(p, step, index, scale)


def saved_and_loaded(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def reloaded(optimizer: RuleOptimizer, make: Callable[[], RuleOptimizer]) -> RuleOptimizer:
    """A fresh optimizer with the state of this one, by way of a file; the state is the same, bit for bit."""
    fresh = make()
    fresh.load_state_dict(saved_and_loaded(optimizer))
    for group, new_group in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert {k: new_group[k] for k in group if k != "params"} == {k: v for k, v in group.items() if k != "params"}
        for p, q in zip(group["params"], new_group["params"], strict=True):
            old, new = optimizer.state.get(p, {}), fresh.state.get(q, {})
            assert set(old) == set(new)
            for key, value in old.items():
                assert new[key].dtype == value.dtype, key
                assert torch.equal(new[key], value), key
                assert not same_memory(new[key], value), key
    return fresh


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.numel() > 0 and a.data_ptr() == b.data_ptr()


def bits(tensor: Tensor) -> Tensor:
    """For comparisons in which NaN equals NaN, and 0 does not equal -0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def wide(tensor: Tensor) -> Tensor:
    """A float64 copy, in real numbers."""
    tensor = tensor.detach()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).to(torch.float64, copy=True)


def close(a: Sequence[Tensor], b: Sequence[Tensor], atol: float) -> None:
    """All differences at once: ``assert_close`` on each of thousands of tensors would take most of the time."""
    assert [x.dtype for x in a] == [x.dtype for x in b]
    error = torch.cat([(x.detach() - y.detach()).abs().flatten() for x, y in zip(a, b, strict=True)]).max()
    assert error <= atol, f"{float(error)} > {atol}"


def math_rounding(p: Tensor) -> float:
    """The largest relative error of one rounding in the type that the math is done in."""
    return 2.0**-53 if p.dtype in (torch.float64, torch.complex128) else 2.0**-24


def round_towards(x: Tensor, dtype: torch.dtype, direction: int) -> Tensor:
    """The nearest bfloat16 number that is not smaller (direction 1) or not larger (-1) than ``x``."""
    near = x.to(dtype)
    away = torch.nextafter(near, torch.full_like(near, direction * math.inf))
    return torch.where((near.double() - x) * direction >= 0, near, away)


class Judge:
    """Makes each step again in float64 and compares; see the top of this file."""

    def __init__(self, name: str, optimizer: RuleOptimizer, kind: Decay | None = None) -> None:
        self.name = name
        self.optimizer = optimizer
        self.kind = kind

    def before(self, inputs: Inputs | None = None) -> None:
        """Remember all that the next step starts from."""
        self.params = [(p, group) for group in self.optimizer.param_groups for p in group["params"]]
        self.weights = [wide(p) for p, _ in self.params]
        self.groups = [dict(group) for _, group in self.params]
        self.states = [{k: wide(v) for k, v in self.optimizer.state.get(p, {}).items()} for p, _ in self.params]
        self.gradients = [None if p.grad is None else wide(p.grad) for p, _ in self.params]
        self.inputs = {name: [wide(given[p]) for p, _ in self.params] for name, given in (inputs or {}).items()}
        max_norm = self.optimizer.options.max_grad_norm
        self.coefficient = references.clip_coefficient([g for g in self.gradients if g is not None], max_norm)

    def _expected(self, nudge: float = 0.0, of_inputs: float = 0.0) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The step in float64, with all gradients and all other inputs moved by so many roundings."""
        gradients = [
            None if g is None else self.coefficient * g + nudge * math_rounding(p) * (self.coefficient * g).abs()
            for (p, _), g in zip(self.params, self.gradients, strict=True)
        ]
        states = [{k: v for k, v in state.items() if k != KAHAN_SLOT} for state in self.states]
        known = [
            {**known_of(p, group), "made": made(self.optimizer, p)}
            for (p, _), group in zip(self.params, self.groups, strict=True)
        ]
        inputs = {
            name: [x + of_inputs * math_rounding(p) * x.abs() for (p, _), x in zip(self.params, values, strict=True)]
            for name, values in self.inputs.items()
        }
        return references.step_all(self.name, self.weights, gradients, states, known, kind=self.kind, inputs=inputs)

    def after(self) -> None:
        """Compare with what the step has made."""
        ways = product((WIGGLE, -WIGGLE), (WIGGLE, -WIGGLE) if self.inputs else (0.0,))
        wanted, *nudged = (self._expected(*nudges) for nudges in ((0.0, 0.0), *ways))
        everywhere = references.REFERENCES[self.name].everywhere
        for number, ((p, _), old, group) in enumerate(zip(self.params, self.weights, self.groups, strict=True)):
            where = f"parameter {number}"
            state, (new, new_state), others = dict(self.states[number]), wanted[number], [row[number] for row in nudged]
            if self.gradients[number] is None:
                assert torch.equal(wide(p), old), where
                for key, value in state.items():
                    if key in everywhere:
                        bound = self.bound(p, value, new_state[key], [other[1][key] for other in others])
                        self.compare(self.optimizer.state[p][key], new_state[key], bound, f"{where}, {key}")
                    else:
                        assert torch.equal(wide(self.optimizer.state[p][key]), value), (where, key)
                continue
            compensation = state.pop(KAHAN_SLOT, torch.zeros_like(old))
            kahan = self.optimizer.options.rounding == "kahan" and p.element_size() == 2
            bound = self.bound(p, old, new, [other[0] for other in others])
            spread, slot_spread = references.REFERENCES[self.name].spread(group), references.REFERENCES[self.name].mixes
            if spread and p.numel():
                bound = bound + spread * math_rounding(p) * (new - old).abs().max()
            stored = self.optimizer.state[p]
            assert set(stored) - {KAHAN_SLOT, "step"} == set(new_state) - {"step"}, where
            if "step" in stored:  # also where only the rounding noise needs it
                begun = "step" in state or "step" not in new_state  # else the reference says whether it is a step
                counted = state.get("step", 0.0) + 1 if begun else new_state["step"]
                assert float(stored["step"]) == float(counted), where
            for slot, value in new_state.items():
                if slot == "step":
                    continue
                begins = old if slot in references.REFERENCES[self.name].weights else value
                bound_of_slot = self.bound(p, state.get(slot, begins), value, [other[1][slot] for other in others])
                if slot_spread and value.numel():
                    # A slot that is stored, and mixed then, is rounded to its storage type twice.
                    twice = 2 * torch.finfo(stored[slot].dtype).eps if stored[slot].dtype == torch.bfloat16 else 0.0
                    bound_of_slot = bound_of_slot + (slot_spread * math_rounding(p) + twice) * value.abs().max()
                self.compare(stored[slot], value, bound_of_slot, f"{where}, {slot}")
            if kahan:
                # What is kept is rounded to the storage type itself, so the sum is right to a rounding of a rounding.
                rest = wide(stored[KAHAN_SLOT])
                unit = torch.finfo(p.dtype)
                rounded = rest.abs().clamp(min=unit.smallest_normal) * unit.eps / 2  # below, numbers are equally spaced
                error = (wide(p) + rest) - (new + compensation)
                assert (error.abs() <= bound + rounded).all(), where
                bound = bound + 2 * math_rounding(p) * compensation.abs()
                new = new + compensation
            self.compare(p, new, bound, where)

    @staticmethod
    def bound(p: Tensor, old: Tensor, new: Tensor, others: Sequence[Tensor]) -> Tensor:
        spread = torch.stack([(other - new).abs() for other in others]).amax(0)
        return ROUNDINGS * math_rounding(p) * torch.maximum(old.abs(), new.abs()) + spread

    def compare(self, stored: Tensor, expected: Tensor, bound: Tensor, where: str) -> None:
        stored = torch.view_as_real(stored) if stored.is_complex() else stored
        dtype = stored.dtype
        if self.optimizer.options.rounding == "stochastic" and dtype == torch.bfloat16:
            low = round_towards(expected - bound, dtype, -1)
            high = round_towards(expected + bound, dtype, 1)
        else:
            low, high = (expected - bound).to(dtype), (expected + bound).to(dtype)
        stored = stored.detach()
        wrong = ~((low <= stored) & (stored <= high))
        assert not wrong.any(), (
            f"{where}: {stored[wrong].tolist()[:3]} is not in [{low[wrong].tolist()[:3]}, {high[wrong].tolist()[:3]}]"
        )


def judged_run(
    name: str,
    options: dict[str, Any],
    params: Sequence[Tensor],
    *,
    steps: int = STEPS,
    reload_at: int | None = None,
    scale: float = 1.0,
    groups: Callable[[], list[dict[str, Any]]] | None = None,
    each_step: Callable[[RuleOptimizer, int], None] = lambda optimizer, step: None,
) -> RuleOptimizer:
    """Step, judging each step, with the state reloaded on the way; returns the optimizer."""

    def make() -> RuleOptimizer:
        return OPTIMIZERS[name].create(list(params) if groups is None else groups(), **options)

    optimizer = make()
    for step in range(steps):
        if step == (steps // 2 if reload_at is None else reload_at):
            optimizer = reloaded(optimizer, make)
        give_gradients(params, step, scale)
        given = [None if p.grad is None else (p.grad, p.grad.clone()) for p in params]
        inputs = inputs_of(name, params, step)
        judge = Judge(name, optimizer)
        judge.before(inputs)
        take_step(optimizer, inputs)
        judge.after()
        for p, pair in zip(params, given, strict=True):
            assert p.grad is (None if pair is None else pair[0])
            assert pair is None or torch.equal(pair[0], pair[1]), "step() changed a gradient"
        each_step(optimizer, step)
    return optimizer


def variant(name: str, kind: Decay) -> Callable[..., RuleOptimizer]:
    """The optimizer with a kind of weight decay that its constructor does not offer."""
    cls: Any = type(f"{name}_{kind}", (OPTIMIZERS[name].cls,), {"decay": classmethod(lambda cls, group: kind)})
    return cls
