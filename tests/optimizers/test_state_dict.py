"""``state_dict`` and back: what is in it, and that a run goes on from it as if nothing had happened."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import references
import torch
from torch import Tensor, nn

from lightning_optim import optimizer_info

from .common import assert_same, contents, each, each_engine, known_warnings, make, parameters, train, weights

pytestmark = known_warnings


@each
def test_state_dict_is_tensors_and_primitives(name: str) -> None:
    optimizer = make(name, parameters(), max_grad_norm=1.0)
    train(optimizer, range(2))

    def check(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                assert type(key) in (str, int)
                check(item)
        elif isinstance(value, list | tuple):
            for item in value:
                check(item)
        else:
            assert value is None or type(value) in (Tensor, int, float, bool, str), type(value)

    state_dict = optimizer.state_dict()
    assert sorted(state_dict) == ["param_groups", "state"]
    check(state_dict)
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=True), state_dict)


@pytest.mark.matrix(
    unless=lambda name, engine, dtype, rounding: (
        references.representative(name)
        or (engine == references.FASTEST and dtype == torch.bfloat16 and rounding == "nearest")
    )
)
@each
@each_engine
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float32, "nearest"),
        (torch.float64, "nearest"),
        (torch.bfloat16, "nearest"),
        (torch.bfloat16, "stochastic"),
        (torch.bfloat16, "kahan"),
    ],
)
def test_reload_in_mid_run_changes_nothing(name: str, engine: str, dtype: torch.dtype, rounding: str) -> None:
    straight, resumed = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer = make(name, straight, engine=engine, rounding=rounding)
    train(optimizer, range(6))
    first = make(name, resumed, engine=engine, rounding=rounding)
    train(first, range(3))
    fresh_params = [nn.Parameter(p.detach().clone()) for p in resumed]
    second = make(name, fresh_params, engine=engine, rounding=rounding, lr=0.9)
    second.load_state_dict(first.state_dict())
    assert_same(contents(second), contents(first))
    train(second, range(3, 6))
    assert_same(weights(fresh_params), weights(straight))
    assert_same(contents(second), contents(optimizer))


@each
def test_loading_keeps_the_groups_keys(name: str) -> None:
    optimizer = make(name, parameters())
    keys = set(optimizer.param_groups[0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert set(optimizer.param_groups[0]) == keys
    assert set(copy.deepcopy(optimizer).param_groups[0]) == keys


@references.common_to_all
@each
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "float64", torch.float32])
def test_state_type_under_low_precision_weights(name: str, state_dtype: Any) -> None:
    """float32 unless asked otherwise, also after loading, where ``torch.optim`` would take the weights' type."""
    expected = {None: torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}.get(
        state_dtype, torch.float32
    )
    params = parameters(dtype=torch.bfloat16)
    optimizer = make(name, params, state_dtype=state_dtype)
    train(optimizer, range(2))
    loaded = make(name, parameters(dtype=torch.bfloat16), state_dtype=state_dtype)
    loaded.load_state_dict(optimizer.state_dict())
    for one in (optimizer, loaded):
        for p, values in one.state.items():
            wide = {values.get(slot) for slot in references.REFERENCES[name].weights}  # not in fewer bits than float32
            like = [v for v in values.values() if v.shape == p.shape and p.ndim and not any(v is w for w in wide)]
            assert {v.dtype for v in like} <= {expected}  # others choose theirs themselves
            assert like or any(v.ndim for v in values.values()) or not p.ndim
            assert "step" not in values or values["step"].dtype == torch.float32
    assert_same(contents(loaded), contents(optimizer))


@each
def test_loaded_tensors_are_its_own(name: str) -> None:
    params = parameters()
    optimizer = make(name, params)
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    before = contents(optimizer)
    other = make(name, parameters())
    other.load_state_dict(saved)
    ours = {v.data_ptr() for s in optimizer.state.values() for v in s.values() if v.numel()}
    theirs = {v.data_ptr() for s in other.state.values() for v in s.values() if v.numel()}
    assert not ours & theirs
    train(other, range(2, 4))
    other.param_groups[0]["lr"] = 123.0
    assert_same(contents(optimizer), before)
    assert_same(saved, before)


@each
def test_load_hooks_and_parameter_names(name: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = make(name, model.named_parameters())
    train(optimizer, range(2))
    saved = optimizer.state_dict()
    names = [group["param_names"] for group in saved["param_groups"]]
    several = "use_muon" in optimizer_info(name).cls.group_options
    assert names == ([["weight"], ["bias"]] if several else [["weight", "bias"]])
    other = make(name, nn.Linear(2, 2).named_parameters())
    calls: list[str] = []

    def pre(opt: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("pre")
        groups = [group | {"lr": 0.5} for group in state_dict["param_groups"]]
        return state_dict | {"param_groups": groups}

    other.register_load_state_dict_pre_hook(pre)
    other.register_load_state_dict_post_hook(lambda opt: calls.append("post"))
    other.load_state_dict(saved)
    assert calls == ["pre", "post"]
    assert other.param_groups[0]["lr"] == 0.5
    assert [group["param_names"] for group in other.param_groups] == names
    nameless = make(name, nn.Linear(2, 2).parameters())
    nameless.load_state_dict(saved)


@each
def test_own_keys_of_groups_are_kept(name: str) -> None:
    """What users and their schedulers write into groups must not make a run lose its state."""
    optimizer = make(name, parameters())
    train(optimizer, range(2))
    optimizer.param_groups[0]["layer_id"] = 3
    other = make(name, parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["layer_id"] == 3
    train(other, [2])


@each
def test_schedulers_keep_pointing_at_the_loaded_groups(name: str) -> None:
    optimizer = make(name, parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    train(optimizer, [0])
    schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, [1])
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["initial_lr"] == 1.0
