"""In place of torch's classes: their switches, their names, and the programs that wrap, copy and divide optimizers."""

from __future__ import annotations

import copy
import pickle  # what spawned processes use
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward

import lightning_optim
from lightning_optim import LAMB, LBFGS, SAM, SGD, Adam, AdamW, Lion, Muon, Prodigy, create_optimizer
from lightning_optim.optimizers.base import RuleOptimizer

from .common import known_warnings, parameters, train

pytestmark = [known_warnings, pytest.mark.filterwarnings("ignore:Muon. the parameters have no names")]

TWINS = [SGD, Adam, AdamW]
CLASSES: list[type[torch.optim.Optimizer]] = [SGD, Adam, AdamW, Lion, LAMB, Muon, LBFGS]


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301 # our own


@pytest.mark.parametrize("cls", TWINS)
def test_torchs_switches_at_their_defaults(cls: type[RuleOptimizer]) -> None:
    switches: dict[str, Any] = {"foreach": None, "fused": False, "differentiable": False}
    if cls is not SGD:  # as in torch
        switches["capturable"] = False
    make: Callable[..., RuleOptimizer] = cls
    for value in (None, False):
        optimizer = make(parameters(), **dict.fromkeys(switches, value))
        assert not set(switches) & set(optimizer.param_groups[0])
    train(make(parameters(), **switches), range(2))
    created = create_optimizer(cls.public_name(), nn.Linear(2, 2), fused=False)
    assert type(created) is cls
    for switch, instead in {
        "foreach": "engine='foreach'",
        "fused": "engine='auto'",
        "capturable": r"capture_steps\(\)",
        "differentiable": "torch.optim's own class",
    }.items():
        if switch in switches:
            with pytest.raises(ValueError, match=rf"{switch}=True .*valid: None, False, and in its place {instead}"):
                make(parameters(), **{switch: True})
            with pytest.raises(TypeError, match=rf"{switch}=1 is neither None nor a bool"):
                make(parameters(), **{switch: 1})
        with pytest.raises(ValueError, match=rf"{switch}=True .*in its place {instead}"):
            make([{"params": parameters(), switch: True}])
        make([{"params": parameters(), switch: False}])
    with pytest.raises(TypeError, match="fusde"):
        make(parameters(), fusde=False)


@pytest.mark.parametrize("cls", CLASSES)
def test_they_show_under_their_public_names(cls: Any) -> None:
    """``LearningRateMonitor`` writes ``lr-AdamW``; pickle and jsonargparse go by another name."""
    name = min((name for name, value in vars(lightning_optim).items() if value is cls), key=len)
    optimizer = cls(parameters(shapes=[(3, 3)]))
    assert repr(optimizer).startswith(f"{name} (")
    assert type(optimizer).__name__ == name == cls.public_name()
    assert cls.__qualname__ == (f"{name}Optim" if hasattr(torch.optim, name) else name)
    assert through_pickle(cls) is cls
    mine = type("Mine", (cls,), {})
    assert mine.__name__ == "Mine"


def test_profiles_name_them() -> None:
    optimizer = AdamW(parameters())
    with torch.profiler.profile() as profile:
        train(optimizer, [0])
    assert "Optimizer.step#AdamW.step" in {event.name for event in profile.events()}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_copies_with_their_module_and_schedule_go_on_alike(cls: Any, duplicate: Callable[[Any], Any]) -> None:
    x = torch.linspace(-1, 1, 12).view(4, 3)

    def advance(model: nn.Module, optimizer: Any, schedule: Any) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        schedule.step()

    model = nn.Linear(3, 3)
    optimizer = cls(model.named_parameters(), lr=0.1)
    made = model, optimizer, lightning_optim.Cosine(optimizer, total_steps=9, warmup_steps=2)
    for _ in range(2):
        advance(*made)
    again = duplicate(made)
    assert again[2].optimizer is again[1]
    assert {id(p) for p in again[0].parameters()} == {id(p) for g in again[1].param_groups for p in g["params"]}
    for _ in range(2):
        advance(*made)
        advance(*again)
    for p, q in zip(model.parameters(), again[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert type(copy.copy(optimizer)) is cls


# -- optimizers of a part of the parameters ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fit(build: Callable[[nn.Module], torch.optim.Optimizer], reload: bool = False) -> Tensor:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.ones(8, 4)
    optimizer = build(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for number in range(4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        schedule.step()
        if reload and number == 1:
            optimizer.consolidate_state_dict()  # type: ignore[attr-defined] # of a ZeroRedundancyOptimizer
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (AdamW, {"lr": 0.1, "engine": "eager", "rounding": "nearest", "state_dtype": "float32", "max_grad_norm": None}),
        (Adam, {"lr": 0.1, "amsgrad": True, "state_dtype": torch.bfloat16, "fused": False}),
        (SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
        (Lion, {"lr": 0.01, "cautious": True}),
        (LAMB, {"lr": 0.01}),
    ],
)
@pytest.mark.usefixtures("one_process")
def test_zero_redundancy_optimizer_takes_our_options(cls: Any, options: dict[str, Any]) -> None:
    expected = fit(lambda model: cls(model.parameters(), **options))
    for reload in (False, True):
        got = fit(lambda model: ZeroRedundancyOptimizer(model.parameters(), cls, **options), reload)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    whole = ZeroRedundancyOptimizer(nn.Linear(2, 2).parameters(), cls, **options)
    whole.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5})
    assert whole.optim.param_groups[1]["lr"] == 0.5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda model: ZeroRedundancyOptimizer(model.parameters(), AdamW, max_grad_norm=1.0),
         r"max_grad_norm=1.0 is about all parameters together, but ZeroRedundancyOptimizer gives each process a part"),
        (lambda model: ZeroRedundancyOptimizer(model.parameters(), SAM, base=SGD), "SAM: the length of its"),
        (lambda model: ZeroRedundancyOptimizer(model.parameters(), LBFGS), "LBFGS: its line search is about all"),
        (lambda model: ZeroRedundancyOptimizer(model.parameters(), Muon, lr=0.1), "Muon: a param group without"),
        (lambda model: ZeroRedundancyOptimizer(model.parameters(), Prodigy), "Prodigy: its step is about all"),
        (lambda model: ZeroRedundancyOptimizer(model.parameters(), AdamW, fused=True), "fused=True"),
        (lambda model: _apply_optimizer_in_backward(AdamW, model.parameters(), {"max_grad_norm": 1.0}),
         "max_grad_norm=1.0 is about all parameters together, but _apply_optimizer_in_backward makes one for each"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("one_process")
def test_what_needs_all_parameters_is_refused_there(build: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(nn.Linear(3, 3))


def test_in_the_backward_pass() -> None:
    model, twin = nn.Linear(3, 3), nn.Linear(3, 3)
    twin.load_state_dict(model.state_dict())
    _apply_optimizer_in_backward(AdamW, model.parameters(), {"lr": 0.1})
    optimizer = AdamW(twin.parameters(), lr=0.1)
    for one in (model, twin):
        one(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize("cls", CLASSES)
def test_weights_of_lazy_modules(cls: type[torch.optim.Optimizer]) -> None:
    """They get their shapes, and torch's optimizers may have them before, at the first forward pass."""
    make: Callable[..., Any] = cls
    module = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(1))
    if cls is Muon:
        for groups in (module.parameters(), [{"params": module.parameters(), "use_muon": True}]):
            with pytest.raises(ValueError, match=r"a lazy module's weight, .* valid: a forward pass before"):
                make(groups)
        return
    optimizer = make(module.parameters(), lr=0.01)
    assert repr(optimizer).startswith(cls.__name__)
    assert not optimizer.state_dict()["state"]
    if isinstance(optimizer, RuleOptimizer):
        assert optimizer.engine_report() == ""
    module(torch.ones(1, 5))
    twin = copy.deepcopy(module)
    for mine, stepped in ((module, optimizer), (twin, make(twin.parameters(), lr=0.01))):

        def closure(mine: nn.Module = mine) -> Tensor:
            mine.zero_grad()
            loss: Tensor = mine(torch.linspace(-1, 1, 10).reshape(2, 5)).square().mean()
            loss.backward()
            return loss

        stepped.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True))
