"""Every optimizer in every situation that training brings: one test per situation, run through the registry."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import adopt, create_optimizer, list_optimizers, optimizer_info
from lightning_optim.engines import ENGINES
from lightning_optim.optimizers.adopt import ADOPTABLE
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS

# Without a C compiler the host engine says so and another one takes its place, "with the same results": that is
# what these tests then find out.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*the host engine cannot be used .no C compiler:lightning_optim.warnings.LightningOptimWarning"
)

each = pytest.mark.parametrize("name", list_optimizers())
each_engine = pytest.mark.parametrize("engine", ["eager", "foreach", "host"])
torch_twins = pytest.mark.parametrize("name", [name for name, info in OPTIMIZERS.items() if info.torch_equivalent])

#: What is set in most tests, for optimizers that have it: nothing should be at a value that switches it off.
USUAL: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}

SHAPES: list[tuple[int, ...]] = [(7, 5), (3,), (), (0, 4)]


@pytest.fixture(autouse=True)
def _no_engine_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_OPTIM_ENGINE", raising=False)


def make(name: str, params: Iterable[Any], **options: Any) -> RuleOptimizer:
    """An optimizer of the registry with the usual options that it has, and those given."""
    info = optimizer_info(name)
    return info.create(params, **{key: v for key, v in USUAL.items() if key in info.options} | options)


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradient(like: Tensor, *key: int) -> Tensor:
    """A gradient for ``like`` that depends on ``key`` (parameter, step) only."""
    generator = torch.Generator().manual_seed(hash(key) % 2**31)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def give_gradients(params: Iterable[Tensor], step: int) -> None:
    for index, p in enumerate(params):
        p.grad = gradient(p, index, step)


def train(optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Steps with the gradients of those numbers."""
    for step in steps:
        give_gradients([p for group in optimizer.param_groups for p in group["params"]], step)
        optimizer.step()


def contents(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of all that an optimizer has, for comparison."""
    return copy.deepcopy(optimizer.state_dict())


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, types and structure included."""
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=f"{where}: {a} and {b}")
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {sorted(map(str, a))} and {sorted(map(str, b))}"
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert a == b, f"{where}: {a!r} and {b!r}"


def test_the_judge_sees_every_difference() -> None:
    same = {"a": [torch.tensor([1.0, float("nan")]), 1, "x"]}
    assert_same(same, copy.deepcopy(same))
    one = torch.tensor([1.0, float("nan")])
    for other in (
        one.clone().fill_(2.0),
        one.double(),
        torch.tensor([1 + 2**-23, float("nan")]),
        one[:1],
        one.tolist(),
    ):
        with pytest.raises(AssertionError):
            assert_same({"a": [one]}, {"a": [other]})


def weights(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


# ---------------------------------------------------------------- gradients that come and go


@each
@each_engine
def test_a_parameter_moves_by_its_own_gradients_only(name: str, engine: str) -> None:
    """Bit for bit as if it had an optimizer for itself: others' missing gradients and shapes do not matter."""
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
    ours, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
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


@each
@each_engine
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"maximize": True}, {"cautious": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_only_read(name: str, engine: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
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
    inside, outside = (parameters(dtype=torch.float64) for _ in range(2))
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
    with pytest.raises(RuntimeError, match=r"parameter 2 \(shape \(5, 2\), cpu\).*sparse=False.*SparseAdam"):
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


# ---------------------------------------------------------------- groups and parameters


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
    assert len(optimizer.param_groups[0]["params"]) == 1
    assert not torch.equal(optimizer.param_groups[0]["params"][0], before[0])
    assert model[0].weight is model[1].weight


@each
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_twice_is_refused(name: str) -> None:
    a, b = parameters(shapes=[(2,), (3,)])
    with pytest.raises(ValueError, match=r"parameter 2 of the group appears twice"):
        make(name, [a, b, a])
    with pytest.raises(ValueError, match="more than one parameter group"):
        make(name, [{"params": [a]}, {"params": [b, a]}])


@each
@each_engine
@pytest.mark.filterwarnings("ignore:.*two weights share memory:lightning_optim.warnings.LightningOptimWarning")
@pytest.mark.parametrize("late", [False, True], ids=["from the start", "tied after steps"])
def test_parameters_that_share_memory_step_one_after_the_other(name: str, engine: str, late: bool) -> None:
    """Tied through ``.data``: as when two optimizers own one each."""

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
    a, b = parameters(shapes=[(4, 3), (5,)])
    lone_a, lone_b = parameters(shapes=[(4, 3), (5,)])
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


# ---------------------------------------------------------------- closures, hooks, life and death


@each
def test_closure(name: str) -> None:
    (p,) = parameters(shapes=[(3,)])
    optimizer = make(name, [p])
    before = weights([p])

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss  # type: ignore[return-value] # as everyone writes it

    expected = p.square().sum().item()
    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert loss is not None
    assert torch.as_tensor(loss).item() == expected
    assert not torch.equal(p, before[0])
    p.grad = None
    assert optimizer.step() is None


@each
def test_step_hooks(name: str) -> None:
    (p,) = parameters(shapes=[(3,)])
    optimizer = make(name, [p])
    seen: list[tuple[str, Tensor]] = []
    pre = optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", p.detach().clone())))
    post = optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("post", p.detach().clone())))
    before = weights([p])[0]
    train(optimizer, [0])
    assert [kind for kind, _ in seen] == ["pre", "post"]
    assert torch.equal(seen[0][1], before)
    assert torch.equal(seen[1][1], p)
    pre.remove()
    post.remove()
    train(optimizer, [1])
    assert len(seen) == 2


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


# ---------------------------------------------------------------- weights and state that change under the optimizer


@each
@each_engine
def test_swapped_data_is_honoured(name: str, engine: str) -> None:
    params, expected = parameters(), parameters()
    optimizer, reference = make(name, params, engine=engine), make(name, expected, engine=engine)
    train(optimizer, range(2))
    train(reference, range(2))
    old = [p.data for p in params]
    kept = weights(params)
    for p in params:
        p.data = p.data.clone()
    train(optimizer, range(2, 4))
    train(reference, range(2, 4))
    assert_same(weights(params), weights(expected))
    assert_same([t.clone() for t in old], kept)


@each
@each_engine
def test_replaced_state_is_honoured(name: str, engine: str) -> None:
    """``state[p][slot] = tensor`` between steps, in whatever type and memory order: as offloading does."""
    params, expected = (parameters(shapes=[(4, 3), (2, 3, 4, 5), (6,)]) for _ in range(2))
    optimizer, reference = make(name, params, engine=engine), make(name, expected, engine=engine)
    for step in range(8):
        for p in params:
            for slot, value in optimizer.state[p].items():
                new = [value.clone(), value.double(), value.clone(), value.to(torch.int64) if slot == "step" else value]
                optimizer.state[p][slot] = new[step % 4]
                if value.ndim == 4 and step == 2:
                    optimizer.state[p][slot] = value.to(memory_format=torch.channels_last)
                if slot == "step" and step == 6:
                    optimizer.state[p][slot] = float(value)
        train(optimizer, [step])
        train(reference, [step])
        for p, q in zip(params, expected, strict=True):
            # Slots that were made float64 above are not rounded to float32 from there on.
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for p in params:
        assert float(optimizer.state[p].get("step", 8)) == 8


@each
@each_engine
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_to_another_type_after_steps(name: str, engine: str, dtype: torch.dtype) -> None:
    """The state keeps its own type, which is not narrowed."""
    model = nn.Linear(4, 3)
    optimizer = make(name, model.parameters(), engine=engine)
    train(optimizer, range(2))
    model.to(dtype)
    before = weights(model.parameters())
    train(optimizer, range(2, 4))
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.dtype == dtype
        assert not torch.equal(p, old)
        assert torch.isfinite(p).all()
        assert {v.dtype for v in optimizer.state[p].values()} == {torch.float32}


@each
@each_engine
def test_memory_format_changed_after_steps(name: str, engine: str) -> None:
    params, expected = (parameters(shapes=[(2, 3, 4, 5)]) for _ in range(2))
    optimizer, reference = make(name, params, engine=engine), make(name, expected, engine=engine)
    train(optimizer, range(2))
    train(reference, range(2))
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    train(optimizer, range(2, 4))
    train(reference, range(2, 4))
    # Norms are summed in memory order.
    torch.testing.assert_close(params[0].data, expected[0].data, rtol=1e-6, atol=1e-7)


@each
@each_engine
@pytest.mark.filterwarnings("ignore:.*weights have gaps:lightning_optim.warnings.LightningOptimWarning")
def test_non_contiguous_weights_and_gradients(name: str, engine: str) -> None:
    """Transposed, sliced with gaps, expanded gradients: the values count, not how they lie in memory."""
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(base.clone().t()), nn.Parameter(base.clone()[:, ::2]), nn.Parameter(base.clone())]
    expected = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    optimizer, reference = make(name, params, engine=engine), make(name, expected, engine=engine)
    for step in range(3):
        give_gradients(expected, step)
        grads: list[Any] = [q.grad for q in expected]
        grads[2] = expected[2].grad = torch.full((1, 1), 0.1 + step).expand(6, 8)
        params[0].grad = grads[0].clone() if step % 2 else grads[0].t().contiguous().t()
        params[1].grad = grads[1].repeat_interleave(2, dim=1)[:, ::2]
        params[2].grad = grads[2]
        expected[2].grad = grads[2].contiguous()
        optimizer.step()
        reference.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.data, q.data, rtol=1e-6, atol=1e-7)  # norms are summed in memory order


@each
@each_engine
def test_a_weight_of_another_shape_is_refused(name: str, engine: str) -> None:
    """Its state no longer fits; nothing may be written beyond the new end."""
    (p,) = parameters(shapes=[(64,)])
    optimizer = make(name, [p], engine=engine)
    train(optimizer, range(2))
    if not any(v.ndim for v in optimizer.state[p].values()):
        pytest.skip("no state that could fail to fit")
    p.grad = None
    p.data = torch.zeros(3)
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"parameter 0.*\(64,\).*\(3,\)|parameter 0.*\(3,\).*\(64,\)"):
        optimizer.step()
    assert torch.equal(p, torch.zeros(3))


@each
@each_engine
def test_a_slot_of_another_shape_is_refused(name: str, engine: str) -> None:
    (p,) = parameters(shapes=[(64,)])
    optimizer = make(name, [p], engine=engine)
    train(optimizer, range(2))
    slot = next(key for key in optimizer.state[p] if key != "step")
    optimizer.state[p][slot] = torch.zeros(3)
    before = weights([p])
    with pytest.raises(RuntimeError, match=rf"parameter 0.*{slot}.*\(3,\)"):
        train(optimizer, [2])
    assert_same(weights([p]), before)


# ---------------------------------------------------------------- state_dict


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
        for values in one.state_dict()["state"].values():
            assert {v.dtype for key, v in values.items() if key != "step"} == {expected}
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
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
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
    assert other.param_groups[0]["param_names"] == ["weight", "bias"]
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


# -- what is not this optimizer's state is refused, and changes nothing ------------------------------------------


def _no(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved.pop(key)


def _damage(slot: str | None, value: Any) -> Callable[[dict[str, Any]], None]:
    """Replace one value of the first parameter's state (``None``: its first slot)."""

    def damage(saved: dict[str, Any]) -> None:
        state = saved["state"][0]
        key = slot or next(k for k in state if k != "step")
        if value is _no:
            del state[key]
        else:
            state[key] = value

    return damage


def _regroup(groups: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved.update(param_groups=groups(saved["param_groups"]))


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no param_groups": (_no("param_groups"), "no 'param_groups'"),
    "no state": (_no("state"), "no 'state'"),
    "a slot is missing": (_damage(None, _no), "parameter 0: .* damaged"),
    "a slot too many": (_damage("fancy", torch.zeros(7, 5)), "parameter 0: .*fancy"),
    "a wrong shape": (_damage(None, torch.zeros(5, 7)), r"parameter 0: .*\(5, 7\).*\(7, 5\)"),
    "no tensor": (_damage(None, "zeros"), "parameter 0: .*str"),
    "a slot of integers": (_damage(None, torch.zeros(7, 5, dtype=torch.int64)), "parameter 0: .*int64"),
    "step is NaN": (_damage("step", torch.tensor(float("nan"))), "parameter 0: step=nan"),
    "step is negative": (_damage("step", -1), "parameter 0: step=-1"),
    "step is a word": (_damage("step", "three"), "parameter 0: step='three'"),
    "step is a vector": (_damage("step", torch.ones(2)), "parameter 0: step="),
    "state of no dict": (lambda saved: saved["state"].update({0: torch.zeros(7, 5)}), "parameter 0: .*Tensor"),
    "states of no dict": (lambda saved: saved.update(state=[1]), "'state'.*list"),
    "groups of no list": (_regroup(lambda groups: {"lr": 1}), "param group"),
    "a group too many": (_regroup(lambda groups: [*groups, groups[0]]), r"\[4, 4\] parameters.*\[4\]"),
    "no group": (_regroup(lambda groups: []), r"\[\] parameters.*\[4\]"),
    "too few parameters": (_regroup(lambda groups: [groups[0] | {"params": [0, 1]}]), r"\[2\] parameters.*\[4\]"),
    "no params": (_regroup(lambda groups: [{k: v for k, v in groups[0].items() if k != "params"}]), "param"),
    "no lr": (_regroup(lambda groups: [{k: v for k, v in groups[0].items() if k != "lr"}]), "has no lr"),
    "a negative lr": (_regroup(lambda groups: [groups[0] | {"lr": -1.0}]), "lr=-1.0"),
    "an lr of no number": (_regroup(lambda groups: [groups[0] | {"lr": "fast"}]), "lr='fast'"),
    "a parameter twice": (_regroup(lambda groups: [groups[0] | {"params": [0, 1, 2, 2]}]), "twice"),
}


@each
@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_state_is_refused_and_changes_nothing(name: str, fault: str) -> None:
    source, target = make(name, parameters()), make(name, parameters(1))
    train(source, range(2))
    train(target, range(3))
    saved = contents(source)
    damage, message = FAULTS[fault]
    if fault.startswith("step") and "step" not in saved["state"][0]:
        pytest.skip("counts no steps")
    if fault == "a slot is missing" and len(saved["state"][0]) == 1:
        pytest.skip("without its only slot, it looks like a parameter without steps")
    damage(saved)
    before, before_weights = contents(target), weights(target.param_groups[0]["params"])
    with pytest.raises((ValueError, TypeError), match=message):
        target.load_state_dict(saved)
    assert_same(contents(target), before)
    assert_same(weights(target.param_groups[0]["params"]), before_weights)
    train(target, [3])
    assert target.engine_report()


def _same_kind(a: str, b: str) -> bool:
    """Adam and AdamW: one rule, whose state either can go on with."""
    return OPTIMIZERS[a].cls.rule is OPTIMIZERS[b].cls.rule


@pytest.mark.parametrize(
    ("source", "target"), [pair for pair in itertools.permutations(list_optimizers(), 2) if not _same_kind(*pair)]
)
@pytest.mark.parametrize("steps", [0, 2], ids=["empty", "stepped"])
def test_state_of_another_optimizer_is_refused(source: str, target: str, steps: int) -> None:
    """Also when the slots have the same names, and also before there are any."""
    theirs, ours = make(source, parameters()), make(target, parameters())
    train(theirs, range(steps))
    train(ours, range(1))
    before = contents(ours)
    with pytest.raises(ValueError, match=rf"(?i)^{target}: .*another optimizer"):
        ours.load_state_dict(theirs.state_dict())
    assert_same(contents(ours), before)


@pytest.mark.parametrize(
    ("source", "target"), [pair for pair in itertools.permutations(list_optimizers(), 2) if _same_kind(*pair)]
)
def test_state_of_the_same_rule_is_taken(source: str, target: str) -> None:
    theirs, params = make(source, parameters()), parameters()
    train(theirs, range(2))
    ours = make(target, params)
    ours.load_state_dict(theirs.state_dict())
    assert_same(contents(ours)["state"], contents(theirs)["state"])
    train(ours, [2])


@pytest.mark.parametrize("name", list_optimizers())
@pytest.mark.parametrize("stranger", ["Adagrad", "RMSprop", "Adadelta", "Rprop", "NAdam", "Adamax", "ASGD"])
def test_state_of_torchs_other_optimizers_is_refused(name: str, stranger: str) -> None:
    # All but RAdam, whose options and state are Adam's, and mean the same.
    theirs = getattr(torch.optim, stranger)(parameters())
    train(theirs, range(2))
    with pytest.raises(ValueError, match="another optimizer"):
        make(name, parameters()).load_state_dict(theirs.state_dict())


# ---------------------------------------------------------------- torch's own classes

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
}
#: Those of torch's options that say how, not what.
HOW = {"fused", "foreach", "capturable"}

variants = pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name, several in VARIANTS.items() for options in several],
    ids=[f"{name}-{options}" for name, several in VARIANTS.items() for options in several],
)


def test_every_twin_has_variants() -> None:
    assert {name for name, info in OPTIMIZERS.items() if info.torch_equivalent} == set(VARIANTS)


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


@variants
@each_engine
@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("direction", ["torch to ours", "ours to torch", "there and back"])
def test_checkpoints_move_between_torch_and_us(name: str, options: dict[str, Any], engine: str, direction: str) -> None:
    """Train with one, load into the other, go on: as if nothing had happened."""
    straight = parameters(dtype=torch.float64)
    _, reference = _pair(name, options, parameters(), straight)
    train(reference, range(6))

    params = parameters(dtype=torch.float64)
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


@variants
@each_engine
@pytest.mark.usefixtures("default_dtype")
def test_adopted_instances_step_as_torch_does(name: str, options: dict[str, Any], engine: str) -> None:
    straight, params, mixed = (parameters(dtype=torch.float64) for _ in range(3))
    _, reference = _pair(name, options, parameters(), straight)
    _, theirs = _pair(name, options, parameters(), params)
    _, alternating = _pair(name, options, parameters(), mixed)
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
    for stranger in (torch.optim.RMSprop([p]), Subclass([p], lr=0.1), make("lion", [p])):
        with pytest.raises(TypeError, match=r"cannot adopt .*valid: torch\.optim\.Adam, .*AdamW, .*SGD"):
            adopt(stranger)
    with pytest.raises(ValueError, match="differentiable=True"):
        adopt(torch.optim.Adam([p], differentiable=True))
    with pytest.raises(ValueError, match=r"engine='warp'.*valid: auto"):
        adopt(torch.optim.Adam([p]), engine="warp")
    with pytest.raises(ValueError, match="max_grad_norm=-1"):
        adopt(torch.optim.Adam([p]), max_grad_norm=-1)
    assert {info.torch_equivalent for info in OPTIMIZERS.values() if info.torch_equivalent} == set(ADOPTABLE)


# ---------------------------------------------------------------- wrong input


def _bad_options() -> list[tuple[str, Any, Any, str]]:
    nan, inf = float("nan"), float("inf")
    no_number = [(value, ValueError) for value in (-1.0, nan, inf)] + [
        (value, TypeError) for value in (True, "1", None)
    ]
    return [
        *(
            (option, value, error, rf"{option}={value!r}.*valid: a (finite )?number")
            for option in ("lr", "eps", "weight_decay", "momentum")
            for value, error in no_number
        ),
        ("lr", torch.tensor([0.1, 0.2]), ValueError, r"lr has shape \(2,\).*valid"),
        ("lr", torch.tensor(-0.1), ValueError, r"lr=-0\.1.*valid"),
        ("betas", "first", ValueError, "betas='first'.*valid: 2 numbers"),
        ("betas", (0.9,), ValueError, r"betas=\(0\.9,\).*valid: 2 numbers"),
        ("betas", (0.9, 0.9, 0.9), ValueError, r"betas=.*valid: 2 numbers"),
        ("betas", 0.9, ValueError, r"betas=0\.9.*valid: 2 numbers"),
        ("betas", (1.0, 0.9), ValueError, r"betas\[0\]=1\.0.*valid: a number in \[0, 1\)"),
        ("betas", (0.9, 1.2), ValueError, r"betas\[1\]=1\.2.*valid: a number in \[0, 1\)"),
        ("betas", (-0.1, 0.9), ValueError, r"betas\[0\]=-0\.1"),
        ("betas", (nan, 0.9), ValueError, r"betas\[0\]=nan"),
        ("betas", (True, 0.9), TypeError, r"betas\[0\]=True is a bool"),
        ("dampening", nan, ValueError, "dampening=nan"),
        ("max_weight_norm", 0.0, ValueError, r"max_weight_norm=0\.0.*> 0"),
        ("max_trust_ratio", -1.0, ValueError, r"max_trust_ratio=-1\.0.*> 0"),
        ("max_grad_norm", 0.0, ValueError, r"max_grad_norm=0\.0.*> 0"),
        ("max_grad_norm", nan, ValueError, "max_grad_norm=nan"),
        ("max_grad_norm", True, TypeError, "max_grad_norm=True"),
        ("max_grad_norm", "1", TypeError, "max_grad_norm='1'"),
        ("maximize", 1, TypeError, "maximize=1 is not a bool.*valid: True, False"),
        ("cautious", "yes", TypeError, "cautious='yes' is not a bool"),
        ("amsgrad", None, TypeError, "amsgrad=None is not a bool"),
        ("nesterov", 0, TypeError, "nesterov=0 is not a bool"),
        ("engine", "warp", ValueError, "engine='warp'.*valid: auto, .*eager.*foreach.*host"),
        ("engine", None, ValueError, "engine=None.*valid: auto"),
        ("rounding", "up", ValueError, "rounding='up'; valid: nearest, stochastic, kahan"),
        ("state_dtype", "int8", ValueError, "state_dtype='int8'.*valid: None, float32"),
        ("state_dtype", torch.int64, ValueError, "state_dtype=torch.int64.*valid: None, float32"),
    ]


@pytest.mark.parametrize(
    ("name", "option", "value", "error", "message"),
    [(name, *bad) for name, info in OPTIMIZERS.items() for bad in _bad_options() if bad[0] in info.options],
)
def test_wrong_options_are_refused(name: str, option: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(name, parameters(), **{option: value})
    (p,) = parameters(shapes=[(2,)])
    if option in make(name, [p]).defaults:
        with pytest.raises(error, match=message):
            make(name, [{"params": [p], option: value}])


@each
def test_every_number_among_the_options_is_checked(name: str) -> None:
    """A new optimizer cannot leave an option out of the checks: each number refuses NaN, each flag a number."""
    optimizer = make(name, parameters())
    for option, default in optimizer.defaults.items():
        wrong: Any = float("nan")
        if isinstance(default, tuple):
            wrong = tuple(wrong for _ in default)
        elif isinstance(default, bool):
            wrong = 1
        with pytest.raises((ValueError, TypeError), match=option):
            make(name, parameters(), **{option: wrong})


@each
def test_wrong_parameters_are_refused(name: str) -> None:
    (p,) = parameters(shapes=[(2,)])
    with pytest.raises(TypeError, match=r"parameter 1 of the group has dtype torch\.int64; valid: floating"):
        make(name, [p, torch.zeros(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match="non-leaf"):
        make(name, [p * 2])
    with pytest.raises(TypeError, match="params argument"):
        make(name, p)
    with pytest.raises(TypeError):
        make(name, ["weight"])


@each
def test_misspelled_options_are_refused(name: str) -> None:
    info = optimizer_info(name)
    with pytest.raises(TypeError, match="weight_deacy"):
        info.create(parameters(), weight_deacy=0.1)
    with pytest.raises(ValueError, match=r"'weight_deacy' in a param group.*did you mean 'weight_decay'.*valid: .*lr"):
        make(name, [{"params": parameters(), "weight_deacy": 0.1}])


@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.9, 0.1), (0.0, 0.1)])
def test_nesterov_needs_undamped_momentum(momentum: float, dampening: float) -> None:
    bad = {"nesterov": True, "momentum": momentum, "dampening": dampening}
    with pytest.raises(ValueError, match=rf"nesterov=True with momentum={momentum}, dampening={dampening}; valid"):
        make("sgd", parameters(), **bad)


# ---------------------------------------------------------------- the registry


def test_names() -> None:
    assert list_optimizers() == sorted(OPTIMIZERS)
    for name, info in OPTIMIZERS.items():
        assert info.name == name == name.lower()
        assert optimizer_info(name.upper()) is info
        assert info.summary
        assert info.paper
    with pytest.raises(ValueError, match=r"unknown optimizer 'adamww' \(did you mean 'adamw'\?\); valid: adam, adamw"):
        optimizer_info("adamww")
    with pytest.raises(ValueError, match="unknown optimizer 'zzz'; valid"):
        create_optimizer("zzz", parameters())


@each
def test_create(name: str) -> None:
    info = optimizer_info(name)
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = create_optimizer(name.upper(), model, lr=0.01, weight_decay=0.1, engine="eager", max_grad_norm=1.0)
    assert type(optimizer) is info.cls
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {"decay": 0.1, "no_decay": 0.0}
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    assert optimizer.options.engine == "eager"
    assert optimizer.options.max_grad_norm == 1.0
    plain = create_optimizer(name, model.parameters(), lr=0.01)
    assert len(plain.param_groups) == 1
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
    common = ("weight_decay", "maximize", "cautious", "engine", "rounding", "state_dtype", "max_grad_norm")
    assert set(common) <= set(info.options)
    assert isinstance(info.create(parameters()), RuleOptimizer)
    for option in info.options:
        assert f"        {option}: " in (info.cls.__doc__ or ""), f"{option} is not documented"
    assert set(make(name, parameters()).defaults) == set(info.options) - {
        "engine", "rounding", "state_dtype", "max_grad_norm"
    }  # fmt: skip


@each
def test_kind(name: str) -> None:
    """An element-wise update of a tensor is the update of its halves; a reducing one is not."""
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
    assert optimizer_info(name).kind == ("elementwise" if same else "reduce")


@each
def test_every_engine_runs_it(name: str) -> None:
    """``engine_report`` says so; this is also what the other tests' ``engine=`` relies on."""
    for engine in ENGINES:
        if ENGINES[engine].unavailable():
            continue
        optimizer = make(name, parameters(), engine=engine)
        train(optimizer, [0])
        assert f": {engine} (requested)" in optimizer.engine_report()
