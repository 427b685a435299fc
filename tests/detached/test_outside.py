"""What others change between steps: weights, states, masters."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from foreign import ForeignAdagrad
from torch import nn

import lightning_optim
from lightning_optim.offload import Detached
from lightning_optim.offload.checkpoint import gathered_masters

from .common import (
    PAIRS,
    Plan,
    assert_same_bits,
    assert_same_state,
    bits,
    detached,
    known_warnings,
    loss_of,
    run,
    small,
    weights,
)

pytestmark = known_warnings


def step(pipeline: Detached, params: list[nn.Parameter], number: int) -> None:
    loss_of(params, number).backward()
    pipeline.step()
    pipeline.zero_grad()


@pytest.mark.parametrize("when", ["before the backward pass", "after it"])
@pytest.mark.parametrize("mode", ["exact", "speculative", "none"])
def test_weights_that_were_changed_are_followed_and_no_update_is_lost(mode: str, when: str) -> None:
    """Others keep their masters' bits, those that were updated before the step their update."""
    if mode == "none" and when == "after it":
        pytest.skip("refused: see test_speculative")
    ends = []
    for kind in ("exact", mode):
        params = weights()
        with detached(PAIRS["torch AdamW"][0](params), small(clip=kind)) as pipeline:
            for number in range(5):
                if when == "after it":
                    loss_of(params, number).backward()
                if number == 3:
                    with torch.no_grad():
                        params[0].clamp_(-0.5, 0.5)
                if when != "after it":
                    loss_of(params, number).backward()
                # Not with "none", whose masters may be ahead of the step.
                known = pipeline.masters() if kind == "exact" else {}
                kept = {p: master.detach().clone() for p, master in known.items()}
                pipeline.step()
                pipeline.zero_grad()
                masters = pipeline.masters()
                for p, before in kept.items():
                    # lr 0.02: AdamW moves no weight by more, and all by something
                    start = p.detach().clone().float() if p is params[0] and number == 3 else before
                    assert (masters[p] - start).abs().max() < 0.03 if p.numel() else True
                    assert not p.numel() or not torch.equal(masters[p], before)
                if number == 3:
                    assert params[0].abs().max() < 0.53
            ends.append([bits(master) for master in pipeline.masters().values()])
    assert all(map(torch.equal, *ends))


def test_masters_that_still_round_to_their_weights_keep_their_bits() -> None:
    params = weights()
    net = nn.ParameterList(params)
    with detached(PAIRS["torch AdamW"][0](params)) as pipeline:
        for number in range(3):
            step(pipeline, params, number)
        before = {p: master.detach().clone() for p, master in pipeline.masters().items()}
        saved = copy.deepcopy(net.state_dict())
        saved["1"].fill_(7.0)
        net.load_state_dict(saved)
        pipeline.read_weights()
        for p, master in pipeline.masters().items():
            assert torch.equal(master, torch.full_like(master, 7.0) if p is params[1] else before[p])
        assert any(not torch.equal(before[p].bfloat16().float(), before[p]) for p in params)
        # A parameter without a gradient does not go back to what was sent before.
        loss_of(params, 3, absent=(1,)).backward()
        pipeline.step()
        assert (params[1] == 7).all()


def test_tensors_put_in_place_of_weights_are_followed() -> None:
    params = weights()
    with detached(PAIRS["torch SGD"][0](params)) as pipeline:
        step(pipeline, params, 0)
        params[0].data = torch.full_like(params[0], 100.0)
        step(pipeline, params, 1)
        assert params[0].min() > 90


@pytest.mark.parametrize("name", ["torch AdamW", "adamw, amsgrad", "sgd, dampening", "foreign Adagrad", "foreign"])
def test_a_state_dict_is_the_standard_one_and_goes_back(name: str) -> None:
    """Only tensors and primitives; a run that is interrupted by saving and loading is the run that is not."""
    make, twin = PAIRS[name]
    straight = run(weights(), make, Plan(steps=6, schedule=False))
    half = run(weights(), make, Plan(steps=3, schedule=False))
    buffer = io.BytesIO()
    torch.save({"state": half.optimizer.state_dict(), "masters": half.masters}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    for values in saved["state"]["state"].values():
        assert all(v.dtype == torch.float32 for v in values.values() if isinstance(v, torch.Tensor))
    whole = twin([nn.Parameter(p.detach().float()) for p in weights()])
    whole.load_state_dict(saved["state"])  # torch's own class takes it
    params = [nn.Parameter(p.detach().clone()) for p in half.params]
    optimizer = make(params)
    with detached(optimizer) as pipeline:
        with pipeline.masters_in_place():
            optimizer.load_state_dict(saved["state"])
        assert_same_state(optimizer.state_dict()["state"], half.state)
        assert pipeline.set_masters(dict(zip(params, saved["masters"], strict=True))) == []
        for number in range(3, 6):
            step(pipeline, params, number)
        masters = [pipeline.masters()[p].detach().clone() for p in params]
    assert_same_bits(type(straight)(params, optimizer, masters), straight)


@pytest.mark.parametrize("mode", ["exact", "speculative"])
@pytest.mark.parametrize("master_dtype", ["float32", "float64"])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, lightning_optim.AdamW, ForeignAdagrad])
def test_state_dtype_following_a_bf16_parameter(cls: Any, master_dtype: str, mode: str) -> None:
    """Torch loads, and Adagrad makes, the state in the weights' type: masters would lose what they are there for."""
    if cls is ForeignAdagrad and mode != "exact":
        pytest.skip("it runs its own step")
    params = weights()
    optimizer = cls(params, lr=0.02)
    wide = getattr(torch, master_dtype)
    with detached(optimizer, small(clip=mode, master_dtype=master_dtype)) as pipeline:

        def types() -> set[torch.dtype]:
            slots = [(n, v) for values in optimizer.state.values() for n, v in values.items()]
            return {v.dtype for n, v in slots if n != "step"}

        step(pipeline, params, 0)
        assert types() == {wide}
        step(pipeline, params, 1)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # not through the strategy
        loss_of(params, 2).backward()
        pipeline.step()
        assert types() == {wide}
        before = optimizer.state_dict()
        with pipeline.masters_in_place():
            optimizer.load_state_dict(copy.deepcopy(before))
        assert types() == {wide}
        assert_same_state(optimizer.state_dict()["state"], before["state"])
    assert all(p.dtype == torch.bfloat16 for p in optimizer.param_groups[0]["params"])


def test_a_state_that_was_there_before() -> None:
    """Of a run in bfloat16 without masters."""
    params = weights()
    optimizer = torch.optim.AdamW(params, lr=0.02)
    loss_of(params, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    old = optimizer.state[params[0]]["exp_avg"].clone()
    assert old.dtype == torch.bfloat16
    with detached(optimizer) as pipeline:
        found = optimizer.state[params[0]]["exp_avg"]
        assert found.dtype == torch.float32
        assert torch.equal(found, old.float())
        step(pipeline, params, 1)
        assert optimizer.state[params[0]]["step"].item() == 2


def test_masters_of_other_weights_are_not_taken() -> None:
    params = weights()
    with detached(PAIRS["torch SGD"][0](params)) as pipeline:
        masters = {p: master.detach().clone() for p, master in pipeline.masters().items()}
        finer = masters[params[0]] * (1 + 1e-4)  # rounds to the same
        strange = pipeline.set_masters(
            {params[0]: finer, params[1]: masters[params[1]] + 1, params[2]: torch.zeros(5), nn.Parameter(finer): finer}
        )
        assert [id(p) for p in strange] in ([id(params[1]), id(params[2])], [id(params[2]), id(params[1])])
        assert torch.equal(pipeline.masters()[params[0]], finer)
        assert torch.equal(pipeline.masters()[params[1]], masters[params[1]])


def test_masters_that_have_more_bits_than_weights_are_what_is_saved() -> None:
    params = [*weights(), *weights(torch.float32, [(2, 2)])]
    names: dict[torch.Tensor, str] = {p: str(number) for number, p in enumerate(params)}
    with detached(PAIRS["torch SGD"][0](params)) as pipeline:
        step(pipeline, params, 0)
        saved = gathered_masters(pipeline, names)
        assert sorted(saved) == [str(number) for number in range(6)]
        assert all(torch.equal(saved[names[p]], pipeline.masters()[p]) for p in params[:6])
        before = saved["0"].clone()
        step(pipeline, params, 1)
        assert torch.equal(saved["0"], before)  # copies


def test_loading_a_state_between_backward_pass_and_step() -> None:
    ends = []
    for mode in ("exact", "speculative"):
        params = weights()
        optimizer = partial(lightning_optim.SGD, lr=0.02, momentum=0.9, dampening=0.5)(params)
        with detached(optimizer, small(clip=mode)) as pipeline:
            for number in range(2):
                step(pipeline, params, number)
            saved = copy.deepcopy(optimizer.state_dict())
            step(pipeline, params, 2)
            loss_of(params, 3).backward()
            optimizer.load_state_dict(saved)
            pipeline.step()
            ends.append([bits(master) for master in pipeline.masters().values()])
    assert all(map(torch.equal, *ends))
