"""torch's own classes: checkpoints move both ways, and instances are adopted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import references
import torch
from foreign import Foreign
from torch import nn

from lightning_optim import adopt, optimizer_info
from lightning_optim.adopt import ADOPTABLE
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS

from .common import SHAPES, each_engine, give_gradients, known_warnings, make, parameters, train

pytestmark = known_warnings

#: Variants by the registry's name: options that both have.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "sgd": [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "weight_decay": 0.1, "fused": True},
        {"momentum": 0.9, "foreach": True},
    ],
    "adam": [
        {},
        {"amsgrad": True},
        {"weight_decay": 0.1, "maximize": True},
        {"fused": True},
        {"amsgrad": True, "fused": True},
        {"foreach": True},
        {"capturable": False, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": "tensor"},
    ],
    "adamw": [
        {},
        {"amsgrad": True},
        {"weight_decay": 0.1, "maximize": True},
        {"fused": True},
        {"amsgrad": True, "fused": True},
        {"foreach": True},
        {"lr": "tensor"},
    ],
    "rmsprop": [
        {},
        {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
        {"centered": True, "foreach": True},
        {"momentum": 0.9, "centered": True, "capturable": False},
    ],
    "radam": [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"foreach": True, "capturable": False}],
    "adafactor": [{}, {"weight_decay": 0.1, "maximize": True}, {"foreach": True}],
}
#: Those of torch's options that say how, not what.
HOW = {"fused", "foreach", "capturable"}

variants = pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name, several in VARIANTS.items() for options in several],
    ids=[f"{name}-{options}" for name, several in VARIANTS.items() for options in several],
)


#: What moves is the same whichever engine has made it: one is enough by default.
engines_alike = pytest.mark.matrix(unless=lambda engine: engine == references.FASTEST)


def test_every_twin_has_variants() -> None:
    assert {name for name, info in OPTIMIZERS.items() if info.torch_equivalent} == set(VARIANTS)


def _parameters(name: str) -> list[nn.Parameter]:
    """In float64; without empty ones where torch's class fails with these."""
    takes_empty = references.REFERENCES[name].twin_takes_empty
    return parameters(dtype=torch.float64, shapes=[shape for shape in SHAPES if takes_empty or 0 not in shape])


def _pair(
    name: str, options: dict[str, Any], params: list[nn.Parameter], theirs: list[nn.Parameter], **more: Any
) -> tuple[RuleOptimizer, torch.optim.Optimizer]:
    twin = optimizer_info(name).torch_equivalent
    assert twin is not None
    options = {"lr": 0.05} | options
    lr = [torch.tensor(0.05, dtype=torch.float64) if options["lr"] == "tensor" else options["lr"] for _ in range(2)]
    ours = optimizer_info(name).create(
        params, **{k: v for k, v in options.items() if k not in HOW} | {"lr": lr[0]} | more
    )
    return ours, twin(theirs, **options | {"lr": lr[1]})


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def default_dtype(request: pytest.FixtureRequest) -> Iterable[torch.dtype]:
    """torch makes its counters in the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


# float64, so that a difference beyond a reordering of operations cannot hide.
EXACT = {"rtol": 1e-12, "atol": 1e-13}


@engines_alike
@variants
@each_engine
@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("direction", ["torch to ours", "ours to torch", "there and back"])
def test_checkpoints_move_between_torch_and_us(name: str, options: dict[str, Any], engine: str, direction: str) -> None:
    """Train with one, load into the other, go on: as if nothing had happened."""
    straight = _parameters(name)
    _, reference = _pair(name, options, _parameters(name), straight)
    train(reference, range(6))

    params = _parameters(name)
    pairs = [_pair(name, options, params, params, engine=engine) for _ in range(3)]
    order: list[torch.optim.Optimizer] = {
        "torch to ours": [pairs[0][1], pairs[1][0]],
        "ours to torch": [pairs[0][0], pairs[1][1]],
        "there and back": [pairs[0][1], pairs[1][0], pairs[2][1]],
    }[direction]
    each_trains = 6 // len(order)
    for turn, optimizer in enumerate(order):
        if turn:
            optimizer.load_state_dict(order[turn - 1].state_dict())
        train(optimizer, range(turn * each_trains, (turn + 1) * each_trains))
    for p, q in zip(params, straight, strict=True):
        torch.testing.assert_close(p, q, **EXACT)  # type: ignore[arg-type] # tolerances
    for index, values in reference.state_dict()["state"].items():
        for key, value in values.items():
            if value is not None:
                found = torch.as_tensor(order[-1].state_dict()["state"][index][key])
                torch.testing.assert_close(found.double(), torch.as_tensor(value).double(), **EXACT)  # type: ignore[arg-type]


@engines_alike
@variants
@each_engine
@pytest.mark.usefixtures("default_dtype")
def test_adopted_instances_step_as_torch_does(name: str, options: dict[str, Any], engine: str) -> None:
    straight, params, mixed = (_parameters(name) for _ in range(3))
    _, reference = _pair(name, options, _parameters(name), straight)
    _, theirs = _pair(name, options, _parameters(name), params)
    _, alternating = _pair(name, options, _parameters(name), mixed)
    adopted, either = adopt(theirs, engine=engine), adopt(alternating, engine=engine)
    assert adopted.optimizer is theirs
    for step in range(6):
        for all_of_them in (straight, params, mixed):
            give_gradients(all_of_them, step)
            all_of_them[1].grad = None if step == 1 else all_of_them[1].grad
        reference.step()
        adopted.step()
        (either if step % 2 else alternating).step()
    assert adopted.engine_report()
    for others in (params, mixed):
        for p, q in zip(others, straight, strict=True):
            torch.testing.assert_close(p, q, **EXACT)  # type: ignore[arg-type]
    for optimizer in (theirs, alternating):
        for index, values in reference.state_dict()["state"].items():
            found = optimizer.state_dict()["state"][index]
            assert {k for k, v in found.items() if v is not None} == {k for k, v in values.items() if v is not None}
            for key, value in values.items():
                if value is not None:
                    torch.testing.assert_close(found[key].double(), value.double(), **EXACT)  # type: ignore[arg-type]


@each_engine
@pytest.mark.parametrize("by", ["ours", "adopted"])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_momentum_switched_on_later(engine: str, by: str, dampening: float) -> None:
    """The first momentum buffer is the gradient itself, also when the parameter has had steps before."""
    params, expected = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    options = {"momentum": 0.0, "dampening": dampening}
    ours, _ = _pair("sgd", options, params, params, engine=engine)
    _, theirs = _pair("sgd", options, expected, params)
    _, reference = _pair("sgd", options, params, expected)
    adopted = adopt(theirs, engine=engine)
    for step in range(6):
        for optimizer in (ours, theirs, reference):
            optimizer.param_groups[0]["momentum"] = 0.9 if step >= 2 else 0.0
        give_gradients(params, step)
        give_gradients(expected, step)
        if by == "ours":
            ours.step()
        elif step == 1:
            theirs.step()  # torch leaves `momentum_buffer: None` behind
        else:
            adopted.step()
        reference.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, **EXACT)  # type: ignore[arg-type]


def test_adopted_clipping_and_schedule() -> None:
    params, expected = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    theirs, reference = torch.optim.AdamW(params, lr=0.1), torch.optim.AdamW(expected, lr=0.1)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (theirs, reference)]
    adopted = adopt(theirs, max_grad_norm=0.3)
    for step in range(4):
        give_gradients(params, step)
        give_gradients(expected, step)
        torch.nn.utils.clip_grad_norm_(expected, 0.3)
        theirs._opt_called = True  # type: ignore[attr-defined] # what LRScheduler looks for: the instance itself did not step
        adopted.step()
        reference.step()
        for schedule in schedules:
            schedule.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, **EXACT)  # type: ignore[arg-type]


def test_what_cannot_be_adopted() -> None:
    class Subclass(torch.optim.SGD):
        pass

    (p,) = parameters(shapes=[(2,)])
    for stranger in (Foreign([p]), Subclass([p], lr=0.1), make("lion", [p])):
        with pytest.raises(TypeError, match=r"cannot adopt .*valid: .*torch\.optim\.Adam, .*AdamW, .*SGD"):
            adopt(stranger)
    with pytest.raises(ValueError, match="differentiable=True"):
        adopt(torch.optim.Adam([p], differentiable=True))
    with pytest.raises(ValueError, match=r"engine='warp'.*valid: auto"):
        adopt(torch.optim.Adam([p]), engine="warp")
    with pytest.raises(ValueError, match="max_grad_norm=-1"):
        adopt(torch.optim.Adam([p]), max_grad_norm=-1)
    assert {info.torch_equivalent for info in OPTIMIZERS.values() if info.torch_equivalent} == set(ADOPTABLE)
