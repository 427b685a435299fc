"""State dicts that somebody has changed: refused by name, with nothing changed, or loaded for what they say.

A case is an optimizer with a few steps behind it, whose state_dict is mutated in one or two places and loaded by
another one. Then either the load raises and names what is wrong, and the other one is as before; or it has what the
mutated state says, in memory of its own, and steps with it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim import LBFGS, SAM, optimizer_info
from lightning_optim.registry import OPTIMIZERS

from .common import seeds

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_optim.warnings.LightningOptimWarning"),
    pytest.mark.filterwarnings("ignore:.*(complex values to real|quantize|nested tensors|requires_grad|sparse)"),
]

SHAPES = [(4, 3), (3,), (), (2, 3, 2), (0, 2)]
NAN, INF = float("nan"), float("inf")


class Dressed(Tensor):
    """A subclass of Tensor with nothing of its own."""


class Case:
    """What one seed makes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 # no secrets
        pick = self.random.choice
        self.kind = pick([*OPTIMIZERS, "lbfgs", "sam", "sam of torch"])
        self.dtype = pick([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.complex64])
        if self.dtype.is_complex and self.kind in ("lbfgs", "lamb", "adafactor"):
            self.dtype = torch.float32
        self.shapes = self.random.sample(SHAPES, pick([1, 2, 4]))
        self.named, self.groups, self.steps = pick([True, False]), pick([1, 1, 2]), pick([0, 1, 2])
        self.options: dict[str, Any] = {"lr": pick([0.1, torch.tensor(0.1)])}
        name = self.kind if self.kind in OPTIMIZERS else "adamw"
        if self.kind != "lbfgs":
            roundings = ["nearest", "kahan"] + ["stochastic"] * (self.dtype == torch.bfloat16)
            # Most of them by the engine that compiles nothing: it is the loading that is tried.
            self.options["engine"] = pick([*["eager"] * 9, "auto"])
            own = {"amsgrad": True, "momentum": 0.9, "rounding": pick(roundings), "max_grad_norm": 1.0}
            known = optimizer_info(name).options
            self.options |= {key: value for key, value in own.items() if key in known and pick([True, False])}

    def make(self) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        """The optimizer, always the same."""
        generator = torch.Generator().manual_seed(1)
        params = [nn.Parameter(torch.randn(s, generator=generator).to(self.dtype)) for s in self.shapes]
        given: list[Any] = [(f"w{i}", p) for i, p in enumerate(params)] if self.named else list(params)
        half = len(given) // self.groups
        two = self.groups == 2 and half > 0
        groups: Any = [{"params": given[:half], "tag": 1}, {"params": given[half:]}] if two else given
        options = dict(self.options)
        if self.kind == "lbfgs":
            return LBFGS(groups, **options), params
        if self.kind == "sam":
            return SAM(groups, partial(lightning_optim.AdamW, **options)), params
        if self.kind == "sam of torch":
            return SAM(groups, partial(torch.optim.SGD, lr=0.1, momentum=0.9)), params
        return optimizer_info(self.kind).create(groups, **options), params

    def trained(self, steps: int) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        """The optimizer after some steps."""
        optimizer, params = self.make()
        for step in range(steps):
            advance(optimizer, params, step)
        return optimizer, params

    def mutate(self, state_dict: dict[str, Any]) -> str:
        """Change something, and say what."""
        places = list(self._places(state_dict))
        where, change = self.random.choice(places)
        # The pools are made anew for every case: values must not remember what other cases did to them.
        change()
        return where

    def _places(self, saved: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
        pick = self.random.choice
        state, groups = saved["state"], saved["param_groups"]
        for key, values in list(state.items()):
            for name, value in list(values.items()):
                if not isinstance(value, Tensor) and name not in (
                    "step",
                    "order",
                    "gamma",
                    "pending",
                    "noise",
                    "sizes",
                ):
                    continue
                pool = steps_instead(self.random) if name == "step" else tensors_instead(value, self.random)
                yield name, partial(values.__setitem__, name, pick(pool))
                yield name, partial(values.pop, name)
                others = [v for s in state.values() for v in s.values() if isinstance(v, Tensor)]
                yield name, partial(values.__setitem__, name, pick(others or [None]))
            yield "parameter", partial(state.__setitem__, key, pick([[], None, 3, torch.ones(2), {1: 2}, {}]))
            yield "fancy", partial(values.__setitem__, "fancy", pick([torch.ones(2), 3, None, {}]))
            yield "3", partial(values.__setitem__, 3, torch.ones(2))
        for key in (99, -1, *(() if 1 in state else (True,)), 1.5, None, (0,)):
            yield repr(key), partial(state.__setitem__, key, pick([{}, {"step": 1}, 3]))
        for index, group in enumerate(groups):
            for name in list(group):
                if name in ("params", "param_names"):
                    pool = [None, 3, "w0", [], group[name] * 2, group[name][::-1], [0.5], [True], [[0]], [None], {0: 1}]
                    yield (
                        name.removesuffix("s").replace("param_name", "param"),
                        partial(group.__setitem__, name, pick(pool)),
                    )
                else:
                    yield name, partial(group.__setitem__, name, pick(options_instead(group[name])))
                    yield name, partial(group.pop, name)
            yield "", partial(group.__setitem__, "layer_id", pick([3, "x", [1], {}]))
            yield "weight_deacy", partial(rename, group, "weight_decay", "weight_deacy")
            yield "group", partial(groups.__setitem__, index, pick([None, [], 3, "group"]))
        for name in ("state", "param_groups"):
            yield (
                name.rstrip("s").replace("_", " "),
                partial(saved.__setitem__, name, pick([None, 3, "x", [1], {}, []])),
            )
            yield name, partial(saved.pop, name)
        yield "group", partial(groups.append, groups[0])
        yield "group", partial(groups.__setitem__, slice(None), [groups[0]] * len(groups))
        yield "group", partial(groups.pop)


def rename(group: dict[str, Any], old: str, new: str) -> None:
    """Another key for a value."""
    group[new] = group.pop(old, 0.0)


def steps_instead(choice: random.Random) -> list[Any]:
    """What may stand in place of a number of steps."""
    return [
        -1, 0, 7, 2.5, -0.0, NAN, INF, 2**24 + 1, 2**53, 10**400, 1e300, 3 + 0j, 1j, True, "3", None, [3], b"3", {},
        torch.tensor(5), torch.tensor(5, dtype=torch.bfloat16), torch.tensor([5.0]), torch.ones(2), torch.tensor(1j),
        torch.tensor(True), torch.tensor(NAN), torch.empty(()).to("meta"), torch.tensor(2.0, requires_grad=True),
        torch.ones(1).to_sparse(), torch.quantize_per_tensor(torch.tensor([3.0]), 1.0, 0, torch.quint8),
        torch.tensor(5.0).as_subclass(Dressed), numpy.float32(3), numpy.int64(4), numpy.array(5.0), Fraction(4),
        Fraction(1, 2), numpy.float64(NAN),
    ]  # fmt: skip


def tensors_instead(value: Any, choice: random.Random) -> list[Any]:
    """What may stand in place of a slot."""
    pool: list[Any] = [None, 0, 1.5, "zeros", [], [0.5], {}, True, NAN, (), numpy.zeros(3), object()]
    if not isinstance(value, Tensor):
        return [*pool, -1, [0, 0], [-1], [10**30], ["x"], torch.ones(3)]
    real = value.real if value.is_complex() else value
    pool += [
        value.double() if not value.is_complex() else value.to(torch.complex128),
        value.to("meta"), value[None], value.flatten(), value.bool(), real.long(), real.half(),
        value.clone().requires_grad_(), (value * 1).as_subclass(Dressed), torch.full_like(value, NAN),
        real.to(torch.complex64), torch._neg_view(value), torch.zeros(()).expand(value.shape),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), value.new_zeros(()).expand(value.shape),
    ]  # fmt: skip
    if value.is_complex():
        pool.append(value.conj())
    elif value.numel():
        pool.append(torch.quantize_per_tensor(value.float(), 1.0, 0, torch.quint8))
        pool.append(value.to(torch.float8_e4m3fn))
    if value.ndim:
        pool += [value.to_sparse(), value.flip(0), value.transpose(0, -1), value[:0]]
    return pool


def options_instead(value: Any) -> list[Any]:
    """What may stand in place of an option."""
    return [
        None, True, False, -1, 0, 0.5, 1, NAN, INF, 10**400, "fast", "", b"x", [], [0.5], (0.5, 0.5), [0.9, 0.5],
        (2, 3), {}, 1j, object(), numpy.float64(0.5), numpy.float32(0.25), numpy.bool_(True), numpy.array(0.5),
        numpy.array([0.5, 0.5]), numpy.int64(1), Fraction(1, 2), torch.tensor(0.5), torch.ones(2), torch.tensor(1j),
        torch.tensor(True), torch.ones(1), torch.ones(()).to("meta"), torch.tensor(NAN), (torch.tensor(0.5), 0.5),
        torch.tensor(0.5, requires_grad=True) * 1, [None, None], (numpy.float32(0.5), 0.5), torch.ones(1).to_sparse(),
    ]  # fmt: skip


def contents(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of all that an optimizer has."""
    return copy.deepcopy(optimizer.state_dict())


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, types and structure included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def advance(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], step: int) -> None:
    """A step with gradients of its number."""

    def closure() -> Tensor:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        return sum((p.detach().abs().double().sum() for p in params), torch.zeros((), dtype=torch.float64))

    if isinstance(optimizer, SAM | LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def refusal(optimizer: torch.optim.Optimizer, saved: dict[str, Any], errors: Any) -> str | None:
    """The message with which a state is refused; None if it is loaded."""
    try:
        optimizer.load_state_dict(saved)
    except errors as error:
        return str(error)
    return None


def check_what_was_loaded(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """The optimizer has what a state says, and nothing in common with it."""
    theirs = {v.untyped_storage().data_ptr() for v in tensors_in(saved) if v.layout == torch.strided and v.numel()}
    seen: set[int] = set()
    for mine in tensors_in(dict(optimizer.state)):
        pointer = mine.untyped_storage().data_ptr()
        if mine.numel():
            assert pointer not in theirs | seen, "memory in common"
            seen.add(pointer)
        assert type(mine) is Tensor
        assert not mine.requires_grad
        assert not mine.is_inference()
    for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        numbers = dict(zip(values["params"], group["params"], strict=True))
        if "param_names" in group and values.get("param_names") is not None:
            by_name = dict(zip(group["param_names"], group["params"], strict=True))
            numbers = {i: by_name[name] for i, name in zip(values["params"], values["param_names"], strict=True)}
        for number, p in numbers.items():
            for slot, value in (saved["state"].get(number) or {}).items():
                if value is None or slot not in optimizer.state.get(p, {}):
                    assert value is None or slot == "kahan_compensation", f"{slot} was lost"
                    continue
                mine = optimizer.state[p][slot]
                expected = torch.as_tensor(float(value) if isinstance(value, Fraction) else value)
                expected = expected.detach().resolve_conj().resolve_neg().as_subclass(Tensor)
                assert same(mine, expected.to(mine.dtype).reshape(mine.shape)), slot
        for name, value in values.items():
            if name not in ("params", "param_names") and not isinstance(value, Tensor):
                assert repr(plain(group[name])) == repr(plain(value)), name


def plain(value: Any) -> Any:
    """A number of any library as Python's."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, numpy.generic | numpy.ndarray):
        return value.tolist()
    if isinstance(value, Fraction):
        return float(value)
    return type(value) if isinstance(value, Tensor) or type(value) is object else value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All dense tensors in dicts and lists."""
    if isinstance(value, Tensor):
        if not value.is_nested and not value.is_meta and value.layout == torch.strided:
            yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


@pytest.mark.parametrize("seed", seeds(60))
def test_a_mutated_state_is_refused_by_name_or_loaded_for_what_it_says(seed: int) -> None:
    case = Case(seed)
    source, _ = case.trained(case.steps)
    saved = contents(source)
    named = case.mutate(saved)
    target, params = case.trained(1)
    again, others = case.trained(1)
    before = contents(target)
    weights = [p.detach().clone() for p in params]
    refused = refusal(target, saved, Exception if case.kind == "sam of torch" else (ValueError, TypeError))
    if refused is not None:
        if case.kind != "sam of torch":  # which loads all but rho itself
            assert named in refused, f"{refused!r} does not name {named!r}"
        assert same(contents(target), before)
        advance(target, params, 5)
        advance(again, others, 5)
        assert same([p.detach() for p in params], [p.detach() for p in others])
        return
    assert same([p.detach() for p in params], weights)
    if case.kind != "sam of torch":
        if case.kind != "lbfgs":
            check_what_was_loaded(target, saved)
        for step in (5, 6):
            advance(target, params, step)
        contents(target)
