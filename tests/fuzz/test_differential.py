"""Random runs of every optimizer with a rule, judged step by step: against float64, and engines against each other.

A run has random options, groups, types, shapes and strides; between its steps it is saved and loaded, goes to another
engine, has its options changed and gradients dropped. Where values are ordinary, each step is that of the float64
reference, within the roundings of :class:`trajectories.common.Judge`. Where they are not (infinite, NaN, denormal,
huge), float64 says nothing about float32: there all engines must come to the same.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trajectories.common import Judge, reloaded, running_engines, wide

from lightning_optim.optimizers import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS

from .common import seeds

# Weights with gaps go from an engine that was asked for to another one, and this is said.
pytestmark = pytest.mark.filterwarnings("ignore:.*engine cannot be used:lightning_optim.warnings.LightningOptimWarning")

# Sophia's steps ask for evaluations, and SOAP's bases are not unique: their own tests run them.
NAMES = [
    name
    for name, entry in OPTIMIZERS.items()
    if issubclass(entry.cls, RuleOptimizer) and name not in ("sophia", "soap")
]
DTYPES = [torch.float32] * 3 + [torch.bfloat16] * 2 + [torch.float16, torch.float64, torch.complex64]
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (17,), (5, 3), (4, 4), (2, 3, 4), (2, 3, 3, 2), (3, 0, 2), (33, 5)]
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-40, 1e-38, -1e-20, 1e-10, 1e10, -1e19, 3e38, -1.0, 1.0]

#: Options that a group may have, with what is drawn; the constructor's, for all of them, are below.
GROUP_OPTIONS: dict[str, list[Any]] = {
    "lr": [0.0, 1e-4, 0.02, 0.5],
    "betas": [(0.9, 0.999), (0.0, 0.0), (0.3, 0.6), (0.95, 0.98)],
    "eps": [1e-8, 1e-6, 0.1],
    "weight_decay": [0.0, 0.1],
    "momentum": [0.0, 0.5, 0.95],
    "dampening": [0.0, 0.4],
    "nesterov": [False, True],
    "amsgrad": [False, True],
    "max_weight_norm": [None, 0.5],
    "max_trust_ratio": [None, 0.3],
    "adapt_1d": [False, True],
    "maximize": [False, False, True],
    "cautious": [False, False, True],
    "decoupled_weight_decay": [False, True],
    "ns_steps": [3, 5],
    "adjust_lr": ["original", "match_rms_adamw"],
    "stacked": [True, False],
}
#: Of the drawn options, those that a run may change between two steps.
MOVING = ("lr", "betas", "weight_decay", "eps")


def drawn_group(random: Random, name: str) -> dict[str, Any]:
    signature = OPTIMIZERS[name].options
    options = {key: random.choice(values) for key, values in GROUP_OPTIONS.items() if key in signature}
    if options.get("nesterov") and name == "sgd":
        options |= {"momentum": options["momentum"] or 0.5, "dampening": 0.0}
    if name == "adafactor":
        options["eps"] = (random.choice([None, 1e-8, 1e-2]), options["eps"])
    if name == "schedulefreeadamw":
        options["betas"] = (options["betas"][0] or 0.5, options["betas"][1])
    if random.random() < 0.2:
        options["lr"] = torch.tensor(options["lr"], dtype=random.choice([torch.float32, torch.float64]))
    return options


def drawn_options(random: Random, name: str, dtypes: set[torch.dtype]) -> dict[str, Any]:
    """Of the constructor, as far as they go with the parameters' types."""
    roundings = ["nearest", "nearest", "kahan"]
    states: list[str | None] = [None, None, "float32"]
    # Only what is rounded has a step that counts, in rules that do not count themselves.
    if dtypes == {torch.bfloat16} or (dtypes <= {torch.bfloat16, torch.float32} and name in ("adam", "adamw", "lamb")):
        roundings.append("stochastic")
    if not dtypes & {torch.complex64, torch.float64}:
        states.append("bfloat16")
    return {
        "rounding": random.choice(roundings),
        "state_dtype": random.choice(states),
        "max_grad_norm": random.choice([None, None, 0.5]),
    }


def in_memory(random: Random, values: Tensor) -> Tensor:
    """The same values, lying in memory in one of several ways."""
    form = random.randrange(4)
    if form == 0 and values.ndim == 2:
        return values.t().contiguous().t()
    if form == 1 and values.ndim == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if form == 2 and values.ndim:
        gaps = torch.zeros(*values.shape[:-1], 2 * values.shape[-1], dtype=values.dtype)[..., ::2]
        return gaps.copy_(values)
    return values


class Run:
    """Parameters, and optimizers of them, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)  # noqa: S311
        self.noise = torch.Generator().manual_seed(seed)
        self.name = self.random.choice(NAMES)
        count = self.random.randint(1, 6)
        types = [dtype for dtype in DTYPES if not (dtype.is_complex and OPTIMIZERS[self.name].cls.needs)]
        one = self.random.choice(types)
        dtypes = [one if self.random.random() < 0.7 else self.random.choice(types) for _ in range(count)]
        self.params = [nn.Parameter(self.normal(self.random.choice(SHAPES), dtype)) for dtype in dtypes]
        self.options = drawn_options(self.random, self.name, set(dtypes))
        bounds = sorted({0, count, *(self.random.randint(0, count) for _ in range(2))})
        # Where a complex tensor has one dimension, the real one in its place has two.
        complex_lamb = {"adapt_1d": True} if self.name == "lamb" and torch.complex64 in dtypes else {}
        self.groups = [
            {**drawn_group(self.random, self.name), **complex_lamb, "params": self.params[start:end]}
            for start, end in pairwise(bounds)
        ]

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        scale = 10.0 ** self.random.uniform(-2, 2)
        return in_memory(self.random, (scale * torch.randn(shape, generator=self.noise, dtype=torch.float64)).to(dtype))

    def make(self, engine: str) -> RuleOptimizer:
        """An optimizer of the parameters."""
        return OPTIMIZERS[self.name].create([dict(group) for group in self.groups], engine=engine, **self.options)

    def gradient(self, p: Tensor) -> Tensor | None:
        """A gradient for a parameter, perhaps of another type or in another order in memory; or none."""
        if self.random.random() < 0.1:
            return None
        others = [torch.float32, p.dtype] if p.is_floating_point() else [p.dtype]
        g = self.normal(tuple(p.shape), p.dtype if self.random.random() < 0.85 else self.random.choice(others))
        if self.random.random() < 0.1:
            g.zero_()
        if g.ndim == 1 and g.numel() > 1 and self.random.random() < 0.1:
            return g[:1].expand(g.shape)
        return g


def give(p: Tensor, g: Tensor | None) -> None:
    """Set a gradient, which torch lets be of another type only if told so."""
    with contextlib.suppress(AttributeError):
        p.grad_dtype = None
    p.grad = g


@pytest.mark.parametrize("seed", seeds(24))
def test_random_runs_follow_the_reference(seed: int, one_thread: None) -> None:
    run = Run(seed)
    random, engines = run.random, running_engines()
    optimizer = run.make(random.choice(engines))
    for _ in range(random.randint(2, 5)):
        event = random.randrange(6)
        if event == 0:
            optimizer = reloaded(optimizer, lambda: run.make(random.choice(engines)))
        elif event == 1:
            optimizer.use_engine(random.choice(engines))
        elif event == 2:
            for group in optimizer.param_groups:
                key = random.choice([option for option in MOVING if option in group])
                group[key] = drawn_group(random, run.name)[key]
        for p in run.params:
            give(p, run.gradient(p))
        given = [(p.grad, None if p.grad is None else p.grad.clone()) for p in run.params]
        judge = Judge(run.name, optimizer)
        judge.before()
        optimizer.step()
        judge.after()
        for p, (g, copy) in zip(run.params, given, strict=True):
            assert p.grad is g
            assert g is None or (copy is not None and torch.equal(g, copy)), "step() changed a gradient"


def special(run: Run, like: Tensor) -> Tensor:
    """Values of all kinds, in the type and order of another tensor."""
    values = [run.random.choice(SPECIAL) * run.random.choice([1.0, 1.0, 1.1]) for _ in range(like.numel())]
    if run.random.random() < 0.3:  # one kind alone: norms of it are something
        values = values[:1] * like.numel()
    filled = torch.tensor(values, dtype=torch.float64).reshape(like.shape)
    return torch.empty_like(like, requires_grad=False).copy_(filled)


def outcome(
    run: Run, engine: str, starts: Sequence[Tensor], grads: Sequence[Tensor | None], saved: Any
) -> tuple[RuleOptimizer, list[Tensor]]:
    """An optimizer after a step from a saved state by one engine, and its weights and state."""
    for p, start, g in zip(run.params, starts, grads, strict=True):
        p.data.copy_(start)
        give(p, g)
    optimizer = run.make(engine)
    if saved is not None:
        optimizer.load_state_dict(saved)
    optimizer.step()
    states = [optimizer.state.get(p, {}) for p in run.params]
    return optimizer, [wide(p) for p in run.params] + [wide(state[key]) for state in states for key in sorted(state)]


@pytest.mark.parametrize("seed", seeds(14))
def test_engines_agree_where_values_are_not_ordinary(seed: int, one_thread: None) -> None:
    run = Run(seed)
    run.options["rounding"] = "nearest"  # an engine's last bit decides on what noise does
    saved = None
    for _ in range(2):
        starts = [p.detach().clone() for p in run.params]
        if run.random.random() < 0.3:
            starts = [special(run, start) for start in starts]
        grads = [None if run.random.random() < 0.1 else special(run, p) for p in run.params]
        ends = {engine: outcome(run, engine, starts, grads, saved) for engine in running_engines()}
        for engine, (_, end) in ends.items():
            for index, (value, expected) in enumerate(zip(end, ends["eager"][1], strict=True)):
                start = wide(starts[index]) if index < len(starts) else torch.zeros_like(expected)
                assert_alike(value, expected, start, f"{run.name}, {engine}, tensor {index}")
        saved = ends["eager"][0].state_dict()


def assert_alike(value: Tensor, expected: Tensor, start: Tensor, where: str) -> None:
    """Equal up to a few roundings, also of what a difference is taken of; infinite and NaN in the same places."""
    room = 1e-2 * expected.abs() + 1e-5 * start.abs() + 1e-30
    same = (value == expected) | (value.isnan() & expected.isnan()) | ((value - expected).abs() <= room)
    same &= value.isfinite() == expected.isfinite()
    assert same.all(), f"{where}: {value[~same].tolist()[:3]}, right: {expected[~same].tolist()[:3]}"
