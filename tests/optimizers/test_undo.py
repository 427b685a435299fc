"""Steps that are taken back: every bit of weights and state is as before, whatever the gradients were."""

from __future__ import annotations

from typing import Any

import pytest
import references
import torch
from torch import Tensor, nn

from lightning_optim import optimizer_info
from lightning_optim.engines.scaling import LossScale, Scaling
from lightning_optim.optimizers import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS
from lightning_optim.stepping.stepper import Stepper
from lightning_optim.stepping.undo import UndoBuffers

from .common import assert_same, contents, each_engine, give_gradients, gradient, known_warnings, parameters

pytestmark = known_warnings


def undoable(name: str) -> bool:
    return type(optimizer_info(name).create(parameters())._stepper) is Stepper


UNDOABLE = [name for name in OPTIMIZERS if undoable(name)]
each = pytest.mark.parametrize("name", UNDOABLE)
CASES = [(name, case) for name in UNDOABLE for case in references.cases(name)]


def options_of(name: str, case: str) -> dict[str, Any]:
    options = dict(references.cases(name)[case])
    options.pop("max_grad_norm", None)  # of `step`, which these tests take apart
    return options


def forms() -> list[nn.Parameter]:
    """Weights in several orders of memory, complex and without elements; the last but one shares the first's."""
    w = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    image = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    tensors = [w, w.t().clone().t(), image.to(memory_format=torch.channels_last), w.clone()[:, ::2], w[:0], w[0, 0]]
    return [nn.Parameter(p) for p in (*tensors, torch.complex(w, w + 1))]


def step(optimizer: RuleOptimizer, undo: UndoBuffers | None, factor: float | None = None) -> None:
    with torch.no_grad():
        stepper = optimizer._stepper
        stepper.plan(inputs=optimizer.asked_for(None), scaled=factor is not None, undo=undo)
        loss = None if factor is None else LossScale(torch.tensor(1 / factor), torch.zeros(()), check=False)
        stepper.run(None if loss is None else Scaling(None, loss))


def undo(optimizer: RuleOptimizer) -> None:
    with torch.no_grad():
        optimizer._stepper.undo()


def bits(optimizer: RuleOptimizer) -> list[tuple[Any, str, Tensor]]:
    """Copies of weights and state, as bytes: NaN equals itself, and -0 is not 0."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = [(n, "p", p.detach()) for n, p in enumerate(params)]
    found += [(n, name, v) for n, p in enumerate(params) for name, v in sorted(optimizer.state.get(p, {}).items())]
    return [(n, name, v.resolve_conj().reshape(-1).clone().view(torch.uint8)) for n, name, v in found]


def assert_same_bits(a: list[tuple[Any, str, Tensor]], b: list[tuple[Any, str, Tensor]]) -> None:
    assert [entry[:2] for entry in a] == [entry[:2] for entry in b]
    for (number, name, x), (_, _, y) in zip(a, b, strict=True):
        assert torch.equal(x, y), f"{name} of parameter {number}"


@pytest.mark.matrix(
    unless=lambda name, case, engine, spike: (
        engine == references.FASTEST
        and spike == 1e4
        and (case == "default" or (references.representative(name) and case in references.TELLING))
    )
)
@each_engine
@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.parametrize("spike", [1e4, float("nan"), float("inf"), 1e-30])
def test_a_step_is_taken_back(name: str, case: str, engine: str, spike: float) -> None:
    """The first and later ones; and steps after it are those that there would have been without it."""
    params, twins = parameters(), parameters()
    optimizer = optimizer_info(name).create(params, engine=engine, **options_of(name, case))
    straight = optimizer_info(name).create(twins, engine=engine, **options_of(name, case))
    buffers = UndoBuffers()
    for number in range(3):
        before = bits(optimizer)
        give_gradients(params, number)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(spike)
        step(optimizer, buffers, 0.5)
        undo(optimizer)
        assert_same_bits(bits(optimizer), before)
        assert bool(optimizer.state) == (number > 0 and bool(straight.state))
        for run, weights in ((optimizer, params), (straight, twins)):
            give_gradients(weights, number)
            step(run, buffers if run is optimizer else None)
    assert_same(contents(optimizer), contents(straight))
    assert_same([p.detach() for p in params], [p.detach() for p in twins])


@pytest.mark.matrix(
    unless=lambda name, engine, rounding, dtype: (
        references.representative(name)
        and engine == references.FASTEST
        and (rounding == "nearest" or dtype == torch.bfloat16)
    )
)
@each_engine
@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_every_type_and_rounding(name: str, engine: str, dtype: torch.dtype, rounding: str) -> None:
    if rounding == "stochastic" and dtype == torch.float16:
        pytest.skip("refused")
    params = parameters(dtype=dtype)
    optimizer = optimizer_info(name).create(params, engine=engine, rounding=rounding, **references.BASE[name])
    buffers = UndoBuffers()
    for number in range(3):
        before = bits(optimizer)
        for factor in (1e4, 0.5):
            give_gradients(params, number)
            step(optimizer, buffers, factor)
            undo(optimizer)
            assert_same_bits(bits(optimizer), before)
        step(optimizer, buffers)


@references.common_to_all
@each_engine
@each
@pytest.mark.filterwarnings("ignore:.*the (host|foreach) engine cannot be used")
def test_every_form(name: str, engine: str) -> None:
    params = [p for p in forms() if all(need.holds(p) for need in optimizer_info(name).cls.needs)]
    optimizer = optimizer_info(name).create(params, engine=engine, **references.BASE[name])
    buffers = UndoBuffers()
    for number in range(3):
        before = bits(optimizer)
        give_gradients(params, number)
        step(optimizer, buffers)
        assert not torch.equal(bits(optimizer)[0][2], before[0][2])
        undo(optimizer)
        assert_same_bits(bits(optimizer), before)
        step(optimizer, buffers)


@each
def test_only_those_that_were_stepped_are_taken_back(name: str) -> None:
    params = parameters()
    optimizer = optimizer_info(name).create(params, **references.BASE[name])
    buffers = UndoBuffers()
    give_gradients(params, 0)
    step(optimizer, buffers)
    middle = bits(optimizer)
    params[0].grad = None
    step(optimizer, buffers)
    undo(optimizer)
    assert_same_bits(bits(optimizer), middle)


def test_a_plan_in_between_changes_nothing() -> None:
    """One for a norm, say, which does not run."""
    params = parameters()
    optimizer = optimizer_info("sgd").create(params, lr=0.1, momentum=0.9, dampening=0.5)
    buffers = UndoBuffers()
    give_gradients(params, 0)
    before = bits(optimizer)
    with torch.no_grad():
        optimizer._stepper.plan(inputs=optimizer.asked_for(None), scaled=True, undo=buffers)
        optimizer._stepper.squares()
        step(optimizer, buffers)
        optimizer._stepper.plan(inputs=optimizer.asked_for(None), scaled=True, undo=buffers)
        optimizer._stepper.squares()
    undo(optimizer)
    assert_same_bits(bits(optimizer), before)
    assert not optimizer.state


def test_a_plan_that_does_not_run_leaves_first_steps_to_come() -> None:
    """And a state that was loaded since is not its to drop."""
    ends = []
    for plans in (0, 1, 2):
        params = parameters()
        optimizer = optimizer_info("sgd").create(params, lr=0.1, momentum=0.9, dampening=0.5)
        for number in range(2):
            give_gradients(params, number)
            for _ in range(plans):
                optimizer._stepper.plan(inputs=optimizer.asked_for(None), scaled=True)
            step(optimizer, None)
        ends.append(contents(optimizer))
        saved = contents(optimizer)
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])
    fresh = optimizer_info("sgd").create(parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    give_gradients(fresh.param_groups[0]["params"], 0)
    fresh._stepper.plan()
    fresh.load_state_dict(saved)
    fresh._stepper.abandon()
    assert_same(contents(fresh)["state"], saved["state"])
    fresh._stepper.plan()
    fresh._stepper.abandon()
    assert_same(contents(fresh)["state"], saved["state"])


def test_there_must_be_a_step_to_take_back() -> None:
    params = parameters()
    optimizer = optimizer_info("adamw").create(params)
    give_gradients(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="there is no step to take back"):
        undo(optimizer)
    step(optimizer, UndoBuffers())
    undo(optimizer)
    with pytest.raises(RuntimeError, match="there is no step to take back"):
        undo(optimizer)


def test_a_step_that_fails_halfway_is_taken_back_as_far_as_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [*parameters(), *parameters(1, torch.float64)]  # two types, two buckets
    optimizer = optimizer_info("adamw").create(params)
    buffers = UndoBuffers()
    give_gradients(params, 0)
    step(optimizer, buffers)
    before = bits(optimizer)
    table = optimizer._stepper._table
    calls = 0

    def fails(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError("no memory")
        return table(*args)

    monkeypatch.setattr(optimizer._stepper, "_table", fails)
    give_gradients(params, 1)
    with pytest.raises(MemoryError):
        step(optimizer, buffers)
    undo(optimizer)
    assert_same_bits(bits(optimizer), before)


def test_buffers_are_made_once() -> None:
    """Also for weights with gaps, whose order in memory no copy has."""
    buffers = UndoBuffers()
    for tensor in (torch.zeros(3, 4), torch.zeros(4, 3).t(), torch.zeros(3, 8)[:, ::2]):
        first = buffers.buffer(tensor, "p", tensor)
        assert buffers.buffer(tensor, "p", tensor) is first
        assert buffers.buffer(tensor, "p", tensor.double()) is not first
    other = buffers.buffer(tensor, "p", gradient(tensor, 0)[:2])
    assert other.shape == (2, 4)


def test_matrices_cannot_be_taken_back() -> None:
    params = parameters()
    optimizer = optimizer_info("muon").create(params)
    give_gradients(params, 0)
    with pytest.raises(ValueError, match="the step of Muon cannot be taken back; valid: undo=None"):
        optimizer._stepper.plan(inputs=optimizer.asked_for(None), undo=UndoBuffers())
