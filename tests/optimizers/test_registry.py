"""The registry: names, construction, signatures, kinds and engines."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_optim import create_optimizer, list_optimizers, optimizer_info
from lightning_optim.engines import ENGINES
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.registry import CLOSURE_OPTIMIZERS, OPTIMIZERS, WRAPPERS
from lightning_optim.stepping.common import Common

from .common import each, gradient, known_warnings, make, parameters, train

pytestmark = known_warnings


def test_names() -> None:
    assert list_optimizers() == sorted({**OPTIMIZERS, **CLOSURE_OPTIMIZERS, **WRAPPERS})
    for name, info in {**OPTIMIZERS, **CLOSURE_OPTIMIZERS, **WRAPPERS}.items():
        assert info.name == name == name.lower()
        assert optimizer_info(name.upper()) is info
        assert info.summary
        assert info.paper
    with pytest.raises(ValueError, match=r"unknown optimizer 'adamww' \(did you mean 'adamw'\?\); valid: .*, adam, "):
        optimizer_info("adamww")
    with pytest.raises(ValueError, match="unknown optimizer 'zzz'; valid"):
        create_optimizer("zzz", parameters())


@each
def test_create(name: str) -> None:
    info = optimizer_info(name)
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = create_optimizer(name.upper(), model, lr=0.01, weight_decay=0.1, engine="eager", max_grad_norm=1.0)
    assert type(optimizer) is info.cls
    several = "use_muon" in info.cls.group_options  # and then vectors have an lr of their own
    names = ["decay.muon", "no_decay.adamw"] if several else ["decay", "no_decay"]
    assert [group["name"] for group in optimizer.param_groups] == names
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 3e-4 if several else 0.01]
    assert optimizer.options.engine == "eager"
    assert optimizer.options.max_grad_norm == 1.0
    plain = create_optimizer(name, model.parameters(), lr=0.01)
    assert len(plain.param_groups) == 1 + several
    with pytest.raises(
        TypeError, match=rf"{name} has no option 'weight_deacy' \(did you mean 'weight_decay'\?\); valid: lr"
    ):
        create_optimizer(name, model, weight_deacy=0.1)
    with pytest.raises(ValueError, match="layer_decay, no_decay and overrides need a module"):
        create_optimizer(name, model.parameters(), layer_decay=0.5)


@each
def test_constructor(name: str) -> None:
    """What the command line, editors and the registry read off the signature."""
    info = optimizer_info(name)
    assert info.options[0] == "lr"
    common = {"weight_decay", "maximize", "cautious", "engine", "rounding", "state_dtype", "max_grad_norm"}
    if info.kind == "matrix":
        common.remove("cautious")  # a mask would undo the orthogonalization
    assert common <= set(info.options)
    assert isinstance(info.create(parameters()), RuleOptimizer)
    for option in info.options:
        documented = (info.cls.__doc__ or "") + (Common.__doc__ or "")
        assert f"        {option}: " in documented, f"{option} is not documented"
    of_all_groups = {"engine", "rounding", "state_dtype", "max_grad_norm", "adamw_lr", "adamw_patterns", "hessian"}
    assert (
        set(make(name, parameters()).defaults) - {"use_muon", "updates", "train_mode"}
        == set(info.options) - of_all_groups
    )


@each
def test_kind(name: str) -> None:
    """An element-wise update of a tensor is the update of its halves; of other kinds, it is not."""
    (whole,) = parameters(shapes=[(4, 6)], dtype=torch.float64)
    halves = [nn.Parameter(part.clone()) for part in whole.detach().chunk(2)]
    optimizer, split = make(name, [whole]), make(name, halves)
    for step in range(3):
        whole.grad = gradient(whole, 0, step)
        for half, part in zip(halves, whole.grad.chunk(2), strict=True):
            half.grad = part
        optimizer.step()
        split.step()
    same = torch.allclose(whole, torch.cat([half.detach() for half in halves]), rtol=1e-12, atol=1e-13)
    # What all parameters have in common is the same of parts.
    assert (optimizer_info(name).kind == "elementwise" or optimizer.rule.shares) == same
    assert optimizer_info(name).kind in ("elementwise", "reduce", "matrix")


@each
def test_every_engine_runs_it(name: str) -> None:
    """``engine_report`` says so; this is also what the other tests' ``engine=`` relies on."""
    for engine in ENGINES:
        if ENGINES[engine].unavailable():
            continue
        optimizer = make(name, parameters(), engine=engine)
        if name == "adafactor" and ENGINES[engine].uses_addresses:
            train(optimizer, [0])
            assert f"not {engine}: a rule with values of rows and columns needs" in optimizer.engine_report()
            continue
        train(optimizer, [0])
        assert f": {engine} (requested)" in optimizer.engine_report()
