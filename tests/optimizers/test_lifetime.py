"""Life and death: copies, and what is freed when."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import references

from .common import assert_same, contents, each, each_engine, known_warnings, make, parameters, train, weights

pytestmark = known_warnings


@references.common_to_all
@each
@each_engine
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_identically(name: str, engine: str, how: str) -> None:
    params = parameters()
    options = {"engine": engine, "max_grad_norm": 1.0, "state_dtype": "bfloat16", "rounding": "stochastic"}
    optimizer = make(name, params, **options)
    train(optimizer, range(3))
    for p in params:
        p.grad = None
    copied = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))  # noqa: S301
    assert type(copied) is type(optimizer)
    assert copied.options == optimizer.options
    assert_same(contents(copied), contents(optimizer))
    train(optimizer, range(3, 6))
    copies = [p for group in copied.param_groups for p in group["params"]]
    assert copies[0].data_ptr() != params[0].data_ptr()
    train(copied, range(3, 6))
    assert_same(weights(copies), weights(params))
    assert_same(contents(copied), contents(optimizer))


@each
def test_copies_of_a_new_optimizer(name: str) -> None:
    optimizer = make(name, parameters())
    copied = copy.deepcopy(optimizer)
    train(optimizer, range(2))
    train(copied, range(2))
    assert_same(contents(copied), contents(optimizer))


@each
def test_freed_without_the_garbage_collector(name: str) -> None:
    """No reference cycle: gigabytes of state go when the last reference does."""
    params = parameters()
    optimizer = make(name, params, max_grad_norm=1.0)
    train(optimizer, range(2))
    optimizer.engine_report()
    slots = [weakref.ref(v) for state in optimizer.state.values() for v in state.values()]
    assert slots
    gone = weakref.ref(optimizer)
    del optimizer
    assert gone() is None
    assert all(slot() is None for slot in slots)


@each
def test_gradients_and_old_state_are_freed(name: str) -> None:
    """Between steps the optimizer holds neither gradients nor state that was replaced."""
    params = parameters(shapes=[(3, 3)])
    optimizer = make(name, params)
    train(optimizer, range(2))
    grad = weakref.ref(params[0].grad)
    slots = [weakref.ref(v) for v in optimizer.state[params[0]].values()]
    params[0].grad = None
    assert grad() is None
    optimizer.state.clear()
    assert all(slot() is None for slot in slots)
