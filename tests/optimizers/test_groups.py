"""Groups and parameters: empty, tied, twice, added later, with options of their own."""

from __future__ import annotations

from typing import Any

import pytest
import references
import torch
from torch import nn

from lightning_optim import optimizer_info

from .common import (
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


@each
@each_engine
def test_empty_groups_and_tensors(name: str, engine: str) -> None:
    empty = nn.Parameter(torch.empty(0, 3))
    full = nn.Parameter(torch.ones(2))
    optimizer = make(name, [{"params": []}, {"params": [empty]}, {"params": [full]}], engine=engine, max_grad_norm=1.0)
    train(optimizer, range(2))
    assert not torch.equal(full, torch.ones(2))
    assert empty.shape == (0, 3)
    only_empty = make(name, [nn.Parameter(torch.empty(0))], engine=engine, max_grad_norm=1.0)
    train(only_empty, range(2))
    fresh = make(name, [{"params": []}, {"params": [nn.Parameter(torch.empty(0, 3))]}, {"params": [full]}])
    fresh.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="empty parameter list"):
        make(name, [])


@each
def test_tied_modules_are_one_parameter(name: str) -> None:
    """``model.parameters()`` yields a tied weight once, with the sum of both gradients."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    optimizer = make(name, model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    before = weights(model.parameters())
    optimizer.step()
    optimizer.step()  # SOAP's first gradient makes state
    assert len(optimizer.param_groups[0]["params"]) == 1
    assert not torch.equal(optimizer.param_groups[0]["params"][0], before[0])
    assert model[0].weight is model[1].weight


@each
def test_a_parameter_twice_is_stepped_once_with_torchs_warning(name: str) -> None:
    a, b = parameters(shapes=[(2,), (3,)])
    once = parameters(shapes=[(2,), (3,)])
    with pytest.warns(UserWarning, match="optimizer contains a parameter group with duplicate parameters") as seen:
        optimizer = make(name, [a, b, a])
    assert [warning.filename for warning in seen] == [__file__.replace("test_groups", "common")]
    other = make(name, once)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    train(optimizer, range(2))
    train(other, range(2))
    assert_same(weights([a, b]), weights(once))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        named = make(name, [("a", a), ("tied", a), ("b", b)])
    assert named.param_groups[0]["param_names"] == ["a", "b"]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        named.add_param_group({"params": [("c", p := nn.Parameter(torch.ones(2))), ("d", p)]})
    assert [group["param_names"] for group in named.param_groups] == [["a", "b"], ["c"]]


@each
def test_a_parameter_of_two_groups_is_refused(name: str) -> None:
    a, b = parameters(shapes=[(2,), (3,)])
    with pytest.raises(ValueError, match="more than one parameter group"):
        make(name, [{"params": [a]}, {"params": [b, a]}])


@references.common_to_all
@each
@each_engine
@pytest.mark.filterwarnings("ignore:.*two weights share memory:lightning_optim.warnings.LightningOptimWarning")
@pytest.mark.parametrize("late", [False, True], ids=["from the start", "tied after steps"])
def test_parameters_that_share_memory_step_one_after_the_other(name: str, engine: str, late: bool) -> None:
    """Tied through ``.data``: as when two optimizers own one each."""

    rule = optimizer_info(name).cls.rule
    if rule.shares or (not late and any(slot.init == "p" for slot in rule.slots.values())):
        pytest.skip("two optimizers are another thing: of an estimate each, or begun at another weight")

    def pair() -> list[nn.Parameter]:
        params = parameters(shapes=[(4, 3), (4, 3)], dtype=torch.float64)
        if not late:
            params[1].data = params[0].data
        return params

    together, apart = pair(), pair()
    optimizer = make(name, together, engine=engine)
    others = [make(name, [p], engine=engine) for p in apart]
    for step in range(5):
        if late and step == 3:
            together[1].data, apart[1].data = together[0].data, apart[0].data
        give_gradients(together, step)
        give_gradients(apart, step)
        optimizer.step()
        for other in others:
            other.step()
        # Not to the bit: together, they may be stepped by an engine that does one after the other.
        torch.testing.assert_close(weights(together), weights(apart), rtol=1e-12, atol=1e-13)
    assert together[0].data_ptr() == together[1].data_ptr()


@each
@each_engine
def test_add_param_group_after_steps(name: str, engine: str) -> None:
    """The newcomers begin at step 1 with their own options; nothing changes for the others."""
    a, b = parameters(shapes=[(4, 3), (5, 2)])
    lone_a, lone_b = parameters(shapes=[(4, 3), (5, 2)])
    optimizer, first = make(name, [a], engine=engine), make(name, [lone_a], engine=engine)
    other = {"lr": 0.2, "weight_decay": 0.0, "maximize": True}
    second = make(name, [lone_b], engine=engine, **other)
    for step in range(5):
        if step == 2:
            optimizer.add_param_group({"params": [b], "name": "late", **other})
        for pair, index in ((lone_a, a), 0), ((lone_b, b), 1):
            for p in pair:
                p.grad = gradient(p, index, step) if index == 0 or step >= 2 else None
        optimizer.step()
        first.step()
        second.step()
    assert_same(weights([a, b]), weights([lone_a, lone_b]))
    restored = make(
        name, [{"params": [nn.Parameter(a.detach().clone())]}, {"params": [nn.Parameter(b.detach().clone())]}]
    )
    restored.load_state_dict(optimizer.state_dict())
    assert restored.param_groups[1]["maximize"] is True
    assert restored.param_groups[1]["name"] == "late"


@each
@pytest.mark.parametrize(
    ("group", "error"),
    [
        ({"weight_deacy": 0.1}, ValueError),
        ({"lr": -1.0}, ValueError),
        ({"maximize": 1}, TypeError),
        ({"params": [torch.zeros(2, dtype=torch.int64)]}, TypeError),
        ({"params": ["weight"]}, TypeError),
        ({"params": {"a", "b"}}, TypeError),
    ],
)
def test_a_failed_add_param_group_changes_nothing(name: str, group: dict[str, Any], error: type[Exception]) -> None:
    (a,) = parameters(shapes=[(2, 2)])
    optimizer = make(name, [a])
    train(optimizer, range(2))
    before, defaults = contents(optimizer), dict(optimizer.defaults)
    with pytest.raises(error):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **group})
    assert_same(contents(optimizer), before)
    assert optimizer.defaults == defaults
    train(optimizer, [2])


@each
@each_engine
def test_groups_have_their_own_options(name: str, engine: str) -> None:
    """Options of one group do not leak into another; changes between steps count."""
    a, b = parameters(shapes=[(4, 3), (4, 3)])
    lone_a, lone_b = parameters(shapes=[(4, 3), (4, 3)])
    optimizer = make(name, [{"params": [a]}, {"params": [b], "lr": 0.3, "weight_decay": 0.5}], engine=engine)
    single = [make(name, [lone_a], engine=engine), make(name, [lone_b], lr=0.3, weight_decay=0.5, engine=engine)]
    for step in range(5):
        give_gradients([a, b], step)
        give_gradients([lone_a, lone_b], step)
        for group, other in zip(optimizer.param_groups, single, strict=True):
            group["lr"] *= 0.7
            other.param_groups[0]["lr"] *= 0.7
            group["cautious"] = other.param_groups[0]["cautious"] = step == 3
            group["maximize"] = other.param_groups[0]["maximize"] = step == 2
        optimizer.step()
        for other in single:
            other.step()
    assert_same(weights([a, b]), weights([lone_a, lone_b]))
