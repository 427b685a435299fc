"""Options: what is refused, with which words; the memory budget and its arithmetic; the registry's entry."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim import LBFGS, create_optimizer, list_optimizers, optimizer_info
from lightning_optim.engines.host_memory import HostMemory
from lightning_optim.registry import CLOSURE_OPTIMIZERS, OPTIMIZERS

from .common import regression

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, r"LBFGS: lr=-1\.0; valid: a finite number >= 0"),
    ({"lr": "x"}, TypeError, "LBFGS: lr='x' is a str"),
    ({"weight_decay": -0.1}, ValueError, r"weight_decay=-0\.1"),
    ({"history_size": 0}, ValueError, "LBFGS: history_size=0; valid: a whole number >= 1"),
    ({"history_size": 2.5}, TypeError, r"history_size=2\.5 is a float"),
    ({"max_iter": 0}, ValueError, "max_iter=0"),
    ({"max_eval": 1}, ValueError, "max_eval=1; valid: a whole number >= 2"),
    ({"line_search": "wolfe"}, ValueError, "line_search='wolfe'; valid: strong_wolfe, armijo, None"),
    ({"noise": -1.0}, ValueError, r"noise=-1\.0; valid: a relative error in \[0, 1\), 'auto'"),
    ({"noise": "yes"}, TypeError, "noise='yes'"),
    ({"min_curvature": 1.0}, ValueError, r"min_curvature=1\.0"),
    ({"tolerance_grad": -1e-3}, ValueError, r"tolerance_grad=-0\.001"),
    ({"tolerance_change": "x"}, TypeError, "tolerance_change='x'"),
    ({"history_dtype": "bfloat16"}, ValueError, "history_dtype='bfloat16'; valid: None, float32, float64"),
    ({"reuse_evaluation": 1}, TypeError, "reuse_evaluation=1 is not a bool"),
    ({"memory_budget": 0}, ValueError, "memory_budget=0; valid: bytes, a fraction"),
    ({"memory_budget": "8GB"}, TypeError, "memory_budget='8GB' is a str"),
    ({"weight_deacy": 0.1}, TypeError, "weight_deacy"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[next(iter(bad[0])) for bad in BAD])
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LBFGS([nn.Parameter(torch.ones(2))], **options)


def test_bad_groups_and_parameters() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"history_size=3 in a param group is not an option; valid: lr, weight_decay"):
        LBFGS([{"params": [p], "history_size": 3}])
    with pytest.raises(TypeError, match=r"parameter 0 of the group has dtype torch\.int64"):
        LBFGS([torch.ones(2, dtype=torch.int64)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        assert len(LBFGS([p, p]).param_groups[0]["params"]) == 1
    optimizer = LBFGS([p])
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": [q], "lr": -1})
    with pytest.raises(ValueError, match="some parameters appear in more than one"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [q], "lr": 0.5})
    assert optimizer.param_groups[1]["weight_decay"] == 0.0


class Divided(nn.Parameter):
    def to_local(self) -> torch.Tensor:
        return self


def test_divided_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="parameter 0 of the group is a DTensor, divided over processes"):
        LBFGS([Divided(torch.ones(2))])


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory(23_000_000_000, "a test")
    monkeypatch.setattr("lightning_optim.optimizers.lbfgs.memory_budget.host_memory", lambda: memory)


@pytest.fixture
def seven_billion() -> nn.Parameter:
    """Weights of which only the number is real."""
    return nn.Parameter(torch.empty(7_000_000_000, device="meta"))


@pytest.mark.usefixtures("free")
def test_the_arithmetic_of_the_memory_budget(seven_billion: nn.Parameter) -> None:
    with pytest.raises(ValueError, match=r"LBFGS: ") as error:
        LBFGS([seven_billion], history_size=100)
    assert str(error.value) == (
        "LBFGS: history_size=100 x 2 x 7e+09 weights x 4 B = 5.6 TB, and 224.0 GB for 8 vectors, "
        "but 23.0 GB are free; no history fits: train fewer weights"
    )
    fewer = nn.Parameter(torch.empty(100_000_000, device="meta"))
    with pytest.raises(
        ValueError,
        match=r"= 160\.0 GB, .* valid: history_size<=24 with history_dtype='float32' or "
        r"history_size<=10 with history_dtype='float64'",
    ):
        LBFGS([fewer], history_size=100, history_dtype="float64")
    LBFGS([fewer], history_size=24)
    LBFGS([fewer], history_size=10, history_dtype="float64")
    for size, dtype in ((25, "float32"), (11, "float64")):
        with pytest.raises(ValueError, match=r"23\.0 GB are free"):
            LBFGS([fewer], history_size=size, history_dtype=dtype)
    with pytest.raises(ValueError, match=r"but memory_budget=0.25 of the 23.0 GB that are free allows 5\.8 GB; valid"):
        LBFGS([fewer], history_size=20, memory_budget=0.25)
    with pytest.raises(ValueError, match=r"but memory_budget=8000000000 allows 8\.0 GB; valid"):
        LBFGS([fewer], history_size=20, memory_budget=8_000_000_000)
    LBFGS([fewer], history_size=3, memory_budget=8_000_000_000)
    seven_billion.requires_grad_(False)
    optimizer = LBFGS([seven_billion], history_size=100)
    assert not optimizer.state_dict()["state"], "what is frozen takes none"
    with pytest.raises(ValueError, match=r"23\.0 GB are free"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.empty(100_000_000, device="meta"))]})
    assert len(optimizer.param_groups) == 1


def test_no_more_than_said_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check reckons with is what a step allocates and keeps."""
    from lightning_optim.optimizers.lbfgs import options as lbfgs_options

    n, size = 4096 * 3, 7
    p = nn.Parameter(torch.ones(n))
    optimizer = LBFGS([p], history_size=size, memory_budget=4 * n * (2 * size + 8) + 1)
    with pytest.raises(ValueError, match="allows"):
        LBFGS([p], history_size=size, memory_budget=4 * n * (2 * size + 8) - 1)

    def closure() -> torch.Tensor:
        p.grad = p.detach().clone()
        return p.detach().square().sum() / 2

    optimizer.step(closure)
    work = optimizer._work
    assert work is not None
    tensors = {id(t): t for owner in (work, work.iterate, work.history) for t in vars(owner).values()}
    taken = sum(t.nbytes for t in tensors.values() if isinstance(t, torch.Tensor))
    small = sum(t.nbytes for t in (work.history.sy, work.history.yy))
    assert taken - small == 4 * n * (2 * size + lbfgs_options._VECTORS + lbfgs_options._OF_HISTORY)


def test_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, seven_billion: nn.Parameter) -> None:
    def unknown() -> HostMemory:
        raise RuntimeError("unknown")

    monkeypatch.setattr("lightning_optim.optimizers.lbfgs.memory_budget.host_memory", unknown)
    LBFGS([seven_billion], history_size=100)


def test_registry() -> None:
    assert {*OPTIMIZERS, *CLOSURE_OPTIMIZERS} <= set(list_optimizers())
    assert not set(OPTIMIZERS) & set(CLOSURE_OPTIMIZERS)
    for name, info in CLOSURE_OPTIMIZERS.items():
        assert info.name == name == name.lower()
        assert optimizer_info(name.upper()) is info
        assert info.kind == "closure"
        assert info.cls.needs_closure is True
        assert info.summary
        assert info.paper
        public = info.cls.__name__.removesuffix("Optim")
        assert getattr(lightning_optim, public) is info.cls
        assert {public, info.cls.__name__} <= set(vars(lightning_optim)["__all__"])
        for option in info.options:
            assert f"        {option}: " in (info.cls.__doc__ or ""), f"{option} is not documented"


def test_create() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = create_optimizer("LBFGS", model, weight_decay=0.1, history_size=3)
    assert type(optimizer) is LBFGS
    assert [(group["name"], group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [
        ("decay", 0.1, 1.0),
        ("no_decay", 0.0, 1.0),
    ]
    assert optimizer.options.history_size == 3
    with pytest.raises(
        TypeError, match=r"lbfgs has no option 'hisory_size' \(did you mean 'history_size'\?\); valid: lr"
    ):
        create_optimizer("lbfgs", model, hisory_size=3)
    assert LBFGS.public_name() == "LBFGS"
    assert next(iter(inspect.signature(LBFGS).parameters)) == "params"


def test_the_name_is_not_torchs() -> None:
    assert LBFGS.__qualname__ != torch.optim.LBFGS.__qualname__, "which is what jsonargparse goes by"
    assert not issubclass(LBFGS, torch.optim.LBFGS), "Lightning refuses those with mixed precision"


def test_a_tensor_loss_or_a_number() -> None:
    kinds: list[Callable[[Tensor], Any]] = [lambda loss: loss, float, lambda loss: loss.to(torch.float32)]
    for convert in kinds:
        params, problem = regression()
        optimizer = LBFGS(params)
        start = problem.loss().item()
        for _ in range(5):
            optimizer.step(lambda: convert(problem().detach()))  # noqa: B023 # called at once
        assert problem.loss().item() < start
