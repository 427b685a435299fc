"""Gradients that come and go: missing, frozen, clipped, negated, zero and sparse."""

from __future__ import annotations

from typing import Any

import pytest
import references
import torch
from torch import nn

from lightning_optim import optimizer_info
from lightning_optim.registry import OPTIMIZERS

from .common import (
    SHAPES,
    USUAL,
    assert_same,
    contents,
    each,
    each_engine,
    give_gradients,
    gradient,
    known_warnings,
    make,
    parameters,
    train,
    weights,
)

pytestmark = known_warnings

torch_twins = pytest.mark.parametrize("name", [name for name, info in OPTIMIZERS.items() if info.torch_equivalent])


@references.common_to_all
@each
@each_engine
def test_a_parameter_moves_by_its_own_gradients_only(name: str, engine: str) -> None:
    """Bit for bit as if it had an optimizer for itself: others' missing gradients and shapes do not matter."""
    rule = optimizer_info(name).cls.rule
    if rule.every or rule.shares:
        pytest.skip("parameters have something in common: the number of the step, or an estimate")
    params, alone = parameters(), parameters()
    together = make(name, params, engine=engine)
    single = [make(name, [p], engine=engine) for p in alone]
    present = [(0, 1, 2, 3), (1, 3), (0,), (2,), (0, 1, 2), (), (1, 2, 3)]
    for step, indices in enumerate(present):
        before = contents(together)["state"]
        for index, p in enumerate(params):
            p.grad = gradient(p, index, step) if index in indices else None
            alone[index].grad = None if p.grad is None else p.grad.clone()
        together.step()
        after = together.state_dict()["state"]
        for index in range(len(params)):
            single[index].step()
            if index not in indices:
                assert_same(after.get(index), before.get(index))
        assert_same(weights(params), weights(alone))
    for p, q, optimizer in zip(params, alone, single, strict=True):
        assert_same(dict(together.state[p]), dict(optimizer.state[q]))


@each
@each_engine
@pytest.mark.parametrize("started", [False, True])
def test_without_gradients_nothing_happens(name: str, engine: str, started: bool) -> None:
    params = parameters()
    optimizer = make(name, params, engine=engine, max_grad_norm=1.0)
    if started:
        train(optimizer, range(2))
    for p in params:
        p.grad = None
    before, before_state = weights(params), contents(optimizer)
    optimizer.step()
    assert_same(weights(params), before)
    assert_same(contents(optimizer), before_state)


@torch_twins
def test_frozen_then_unfrozen_as_in_torch(name: str) -> None:
    """Bias corrections are each parameter's own."""
    # torch's Adafactor fails with tensors that have no elements.
    shapes = SHAPES if references.REFERENCES[name].twin_takes_empty else [(7, 5), (3,), (), (4, 1)]
    ours, theirs = (parameters(dtype=torch.float64, shapes=shapes) for _ in range(2))
    twin = optimizer_info(name).torch_equivalent
    assert twin is not None
    optimizers = make(name, ours), twin(theirs, **{k: v for k, v in USUAL.items() if k in optimizer_info(name).options})
    for step in range(6):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(params, step)
            if step < 3:
                params[0].requires_grad_(False)
                params[0].grad = None
            else:
                params[0].requires_grad_(True)
            optimizer.step()
    if "step" in optimizers[0].state[ours[0]]:
        assert [int(optimizers[0].state[p]["step"]) for p in ours] == [3, 6, 6, 6]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)  # float64: the order of operations differs


@pytest.mark.matrix(
    unless=lambda name, engine: name == "adamw" or (references.representative(name) and engine == references.FASTEST)
)
@each
@each_engine
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"maximize": True}, {"cautious": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_only_read(name: str, engine: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    if not set(options) <= set(optimizer_info(name).options):
        pytest.skip("does not have the option")
    optimizer = make(name, params, engine=engine, **options)
    for step in range(2):
        give_gradients(params, step)
        grads = [p.grad for p in params]
        before = [g.clone() for g in grads if g is not None]
        optimizer.step()
        assert [p.grad is g for p, g in zip(params, grads, strict=True)] == [True] * len(params)
        assert_same([p.grad for p in params], before)


@each
@each_engine
def test_maximize_descends_along_the_negated_gradient(name: str, engine: str) -> None:
    up, down = parameters(), parameters()
    ascend, descend = make(name, up, engine=engine, maximize=True), make(name, down, engine=engine)
    for step in range(3):
        give_gradients(up, step)
        for p, q in zip(up, down, strict=True):
            assert p.grad is not None
            q.grad = -p.grad
        ascend.step()
        descend.step()
    assert_same(weights(up), weights(down))


@each
@each_engine
@pytest.mark.parametrize("max_norm", [0.5, 1e4])
def test_max_grad_norm_is_torchs_clipping(name: str, engine: str, max_norm: float) -> None:
    # A square matrix: SOAP's bases are unique then.
    shapes = [(5, 5), (3,), (), (0, 4)]
    inside, outside = (parameters(dtype=torch.float64, shapes=shapes) for _ in range(2))
    clipping, plain = make(name, inside, engine=engine, max_grad_norm=max_norm), make(name, outside, engine=engine)
    assert clipping.grad_norm is None
    for step in range(3):
        give_gradients(inside, step)
        give_gradients(outside, step)
        norm = torch.nn.utils.clip_grad_norm_(outside, max_norm)
        clipping.step()
        plain.step()
        assert clipping.grad_norm is not None
        torch.testing.assert_close(clipping.grad_norm.double(), norm.double(), rtol=1e-12, atol=0)
    for p, q in zip(inside, outside, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)  # float64: the norm is summed in another order


@each
@each_engine
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(name: str, engine: str, set_to_none: bool) -> None:
    """A zero gradient is a step (momentum moves on), no gradient is none."""
    params = parameters()
    optimizer = make(name, params, engine=engine)
    train(optimizer, range(2))
    before = weights(params)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else torch.equal(p.grad, torch.zeros_like(p)) for p in params)  # type: ignore[arg-type] # grad is a tensor
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(params, before, strict=True)]
    assert moved == [p.numel() > 0 and not set_to_none for p in params]


@each
@each_engine
def test_sparse_gradients_are_refused_by_name(name: str, engine: str) -> None:
    dense, embedding = nn.Linear(2, 2), nn.Embedding(5, 2, sparse=True)
    params = [*dense.parameters(), *embedding.parameters()]
    optimizer = make(name, params, engine=engine)
    (dense(embedding(torch.tensor([1, 3]))).square().sum()).backward()
    before, before_state = weights(params), contents(optimizer)
    number = [p.shape for group in optimizer.param_groups for p in group["params"]].index(params[2].shape)
    with pytest.raises(RuntimeError, match=rf"parameter {number} \(shape \(5, 2\), cpu\).*sparse=False.*SparseAdam"):
        optimizer.step()
    assert_same(weights(params), before)
    assert_same(contents(optimizer), before_state)


@each
def test_sparse_gradients_of_named_parameters_are_refused_by_that_name(name: str) -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = make(name, embedding.named_parameters())
    embedding(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter 0 \('weight', shape \(5, 2\), cpu\)"):
        optimizer.step()
