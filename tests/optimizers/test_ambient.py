"""The same step, to the bit, whatever a program has set around it: devices, types, autocast, modes of torch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import references
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_optim
from lightning_optim.engines import ENGINES
from lightning_optim.optimizers import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.schedulers import WSD

ENGINE_NAMES = [name for name, engine in ENGINES.items() if engine.unavailable() is None]
NAMES = [name for name, entry in OPTIMIZERS.items() if issubclass(entry.cls, RuleOptimizer)]


class Functions(TorchFunctionMode):
    """Sees all of torch's functions, and changes nothing."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Sees all of torch's operators, and changes nothing."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operator(*args, **(kwargs or {}))


def switched(setter: Callable[[Any], object], value: Any, back: Any) -> Callable[[], AbstractContextManager[None]]:
    @contextlib.contextmanager
    def around() -> Iterator[None]:
        setter(value)
        try:
            yield
        finally:
            setter(back)

    return around


WORLDS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default device": switched(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "float64 by default": switched(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16 by default": switched(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float16 by default": switched(torch.set_default_dtype, torch.float16, torch.float32),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "deterministic": switched(torch.use_deterministic_algorithms, True, False),
    "function mode": Functions,
    "dispatch mode": Operators,
}
WORLD = pytest.mark.parametrize("world", WORLDS)

KINDS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"max_grad_norm": 0.5, "weight_decay": 0.1}),
    (torch.bfloat16, {"rounding": "stochastic", "state_dtype": "bfloat16"}),
]


def random_tensors(dtype: torch.dtype, seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random).to(dtype) for shape in ((8, 6), (5,), (), (4, 3, 2))]


def stepped(name: str, engine: str, world: AbstractContextManager[Any], dtype: torch.dtype, options: Any) -> list[Any]:
    """All that is left after some steps in a world, with a schedule and a reload, and one step outside of it."""
    params = [nn.Parameter(value) for value in random_tensors(dtype, 0)]
    gradients = [random_tensors(dtype, seed) for seed in range(1, 5)]

    def make() -> RuleOptimizer:
        return OPTIMIZERS[name].create(params, engine=engine, **options)

    def step() -> None:
        for p, g in zip(params, gradients.pop(0), strict=True):
            p.grad = g
        optimizer.step()

    with world:
        optimizer = make()
        schedule = WSD(optimizer, total_steps=10)
        step()
        schedule.step()
        state = optimizer.state_dict()
        optimizer = make()
        optimizer.load_state_dict(state)
        step()
        step()
        norm = optimizer.grad_norm
    step()
    slots = [value for p in params for _, value in sorted(optimizer.state[p].items())]
    return [*params, *slots, *([] if norm is None else [norm]), torch.tensor(schedule.get_last_lr())]


@pytest.mark.matrix(
    unless=lambda name, engine: name == "adamw" or (references.representative(name) and engine == references.FASTEST)
)
@WORLD
@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_the_same_in_every_world(name: str, engine: str, world: str) -> None:
    for dtype, options in KINDS:
        expected = stepped(name, engine, contextlib.nullcontext(), dtype, options)
        found = stepped(name, engine, WORLDS[world](), dtype, options)
        for a, b in zip(expected, found, strict=True):
            assert (a.dtype, a.device) == (b.dtype, b.device)
            assert torch.equal(a, b)


def minimized(world: AbstractContextManager[Any], **options: Any) -> Tensor:
    """Weights after some steps of L-BFGS; the closure's own operators are kept out of the world."""
    random = torch.Generator().manual_seed(0)
    matrix, target = torch.randn(30, 30, generator=random), torch.randn(30, generator=random)
    weight = nn.Parameter(torch.zeros(30))

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", enabled=False):
            loss: Tensor = ((matrix * weight).sum(1) - target).square().sum()
        loss.backward()
        return loss

    with world:
        optimizer = lightning_optim.LBFGS([weight], **options)
        for step in range(6):
            if step == 3:
                state = optimizer.state_dict()
                optimizer = lightning_optim.LBFGS([weight], **options)
                optimizer.load_state_dict(state)
            optimizer.step(closure)
    return weight.detach()


@pytest.mark.parametrize("world", [name for name in WORLDS if name != "inference mode"])  # there is no backward pass
@pytest.mark.parametrize("options", [{"reuse_evaluation": True}, {"noise": "auto", "weight_decay": 0.1}], ids=str)
def test_lbfgs_is_the_same_in_every_world(options: dict[str, Any], world: str) -> None:
    expected = minimized(contextlib.nullcontext(), **options)
    assert expected.abs().sum() > 0
    assert torch.equal(minimized(WORLDS[world](), **options), expected)


@WORLD
def test_groups_are_made_in_every_world(world: str) -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    with warnings.catch_warnings(), WORLDS[world]():
        optimizer = lightning_optim.create_optimizer("muon", module)
        assert ": " in optimizer.engine_report()
        assert not optimizer.state


@WORLD
def test_torchs_own_optimizers_are_stepped_in_every_world(world: str) -> None:
    ends = []
    for around in (contextlib.nullcontext(), WORLDS[world]()):
        weight, gradient = random_tensors(torch.float32, 0)[:1], random_tensors(torch.float32, 1)[0]
        p = nn.Parameter(weight[0])
        with around:
            adopted = lightning_optim.adopt(torch.optim.AdamW([p], lr=0.1))
            for _ in range(2):
                p.grad = gradient
                adopted.step()
        ends.append(p.detach())
    assert torch.equal(*ends)
