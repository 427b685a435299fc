"""Steps in eigenbases: the reference, renewals, what begins, batches, memory and control."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import references
import torch
from interrupting import Interrupt, ours
from references import soap as reference
from torch import Tensor, nn

from lightning_optim import SOAP
from lightning_optim.engines import eigenbases
from lightning_optim.engines.scaling import LossScale
from lightning_optim.stepping.undo import UndoBuffers

from .common import ENGINES_HERE, contents, each_engine, give_gradients, normal, same, train, weights

# Rotations sum in another order, in float64; and renewals multiply what rounding did by ratios of eigenvalues.
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


CASES = reference.VARIANTS


def settle(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Take the bases from the optimizer, if they are such: of equal eigenvalues any will do, and signs are free."""
    for name in [name for name in expected if name.startswith("q_")]:
        basis, matrix = found[name], expected[name.replace("q_", "gg_")]
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=basis.dtype), **CLOSE)
        turned = basis.T @ matrix @ basis
        torch.testing.assert_close(turned, turned.diagonal().diag(), **CLOSE)
        assert bool((turned.diagonal().diff() <= 1e-10).all()), "by falling eigenvalue"
        expected[name] = basis.clone()


@pytest.mark.parametrize(("engine", "case"), [*((e, "default") for e in ENGINES_HERE), *(("eager", c) for c in CASES)])
def test_steps_of_all_shapes_are_the_references(engine: str, case: str) -> None:
    options = reference.BASE | reference.VARIANTS.get(case, {})
    params = weights()
    exact: list[tuple[Tensor, dict[str, Tensor]]] = [(p.detach().clone(), {}) for p in params]
    optimizer = SOAP(params, engine=engine, **options)
    for step in range(14):
        if step == 7:
            fresh = SOAP(params, engine=engine, lr=0.9)
            fresh.load_state_dict(saved_and_loaded(optimizer))
            optimizer = fresh
        group = {"updates": 0, **optimizer.param_groups[0]}
        train(optimizer, params, [step])
        for index, p in enumerate(params):
            weight, state = exact[index]
            assert p.grad is not None
            weight, state = references.step("soap", weight, p.grad, state, group)
            exact[index] = weight, state
            if step == 0:
                settle(optimizer.state[p], state)
            assert set(optimizer.state[p]) == set(state)
            torch.testing.assert_close(p.detach(), weight, **CLOSE)
            for name, value in state.items():
                torch.testing.assert_close(optimizer.state[p][name].double(), value.double(), **CLOSE)
    assert optimizer.param_groups[0]["updates"] == 14


def saved_and_loaded(optimizer: SOAP) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_engine
def test_the_first_gradient_only_makes_the_state(engine: str) -> None:
    params = weights()
    before = [p.detach().clone() for p in params]
    optimizer = SOAP(params, engine=engine, max_grad_norm=0.5, weight_decay=0.1)
    train(optimizer, params, [0])
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert {float(optimizer.state[p]["step"]) for p in params if p.numel()} == {0.0}
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    assert optimizer.grad_norm is not None
    torch.testing.assert_close(float(optimizer.grad_norm), float(norm), rtol=1e-12, atol=0)
    (first, *_) = params
    assert first.grad is not None
    clipped = first.grad * 0.5 / norm
    torch.testing.assert_close(optimizer.state[first]["gg_0"], 0.05 * clipped @ clipped.T, rtol=1e-5, atol=1e-12)


@each_engine
def test_a_plan_that_is_not_run_begins_nothing(engine: str) -> None:
    """As for a norm, or by whoever plans anew."""
    params = weights()
    before = [p.detach().clone() for p in params]
    optimizer: Any = SOAP(params, engine=engine)
    give_gradients(params, 0)
    for _ in range(2):
        assert optimizer._stepper.plan()
    with torch.no_grad():
        optimizer._stepper.run(None)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert {float(optimizer.state[p]["step"]) for p in params if p.numel()} == {0.0}


@each_engine
@pytest.mark.parametrize("frequency", [2, 10])
def test_a_resumed_run_is_the_same_to_the_bit(engine: str, frequency: int) -> None:
    straight, resumed = weights(dtype=torch.float32), weights(dtype=torch.float32)
    one = SOAP(straight, engine=engine, precondition_frequency=frequency)
    other = SOAP(resumed, engine=engine, precondition_frequency=frequency)
    for step in range(13):
        train(one, straight, [step])
        train(other, resumed, [step])
        fresh = SOAP(resumed, engine=engine)
        fresh.load_state_dict(saved_and_loaded(other))
        other = fresh
    assert same(contents(one, straight), contents(other, resumed))


@each_engine
def test_batches_are_their_tensors_one_by_one(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = weights(), weights()
    optimizer = SOAP(together, engine=engine, precondition_frequency=2)
    single = [SOAP([p], engine=engine, precondition_frequency=2) for p in apart]
    batches: list[int] = []
    qr = torch.linalg.qr

    def noting(x: Tensor) -> Any:
        batches.append(len(x))
        return qr(x)

    for step in range(6):
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "qr", noting)
            train(optimizer, together, [step])
        give_gradients(apart, step)
        for one in single:
            one.step()
        if step == 0:
            for p, q in zip(together, apart, strict=True):
                for one in single:
                    if q in one.state:
                        one.state[q].update({name: value.clone() for name, value in optimizer.state[p].items()})
        for p, q in zip(together, apart, strict=True):
            torch.testing.assert_close(p, q, **CLOSE)
    # At two renewals, for each dimension: of (5, 3) there are three.
    assert batches == [3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1] * 2


def test_large_weights_are_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stacked is copied."""
    params = weights([(5, 3)] * 5)
    optimizer: Any = SOAP(params)
    monkeypatch.setattr(type(optimizer.matrix_rule.transform), "most", 30)
    give_gradients(params, 0)
    assert optimizer._stepper.plan()
    assert [batch.count for batch in optimizer._stepper._batches] == [2, 2, 1]
    optimizer._stepper.abandon()


@each_engine
@pytest.mark.filterwarnings("ignore:.*weights have gaps:lightning_optim.warnings.LightningOptimWarning")
def test_memory_order_does_not_matter(engine: str) -> None:
    def reversed_(p: Tensor) -> Tensor:
        return p.permute(*order).contiguous().permute(*order) if (order := [*reversed(range(p.ndim))]) else p

    expected = weights()
    orders: list[Any] = [reversed_, lambda p: torch.stack([p, p], dim=-1)[..., 0]]
    for order in orders:
        plain = [nn.Parameter(p.detach().clone()) for p in expected]
        params = [nn.Parameter(order(p.detach())) for p in expected]
        optimizer, twin = (SOAP(ps, engine=engine, precondition_frequency=2) for ps in (params, plain))
        for step in range(5):
            train(optimizer, params, [step])
            train(twin, plain, [step])
            for p, q in zip(params, plain, strict=True):
                torch.testing.assert_close(p, q, **CLOSE)


@each_engine
def test_a_step_that_is_left_out_leaves_no_trace(engine: str) -> None:
    """Nor is anything renewed at it, at the first gradient as later."""
    params = weights(dtype=torch.float32)
    optimizer: Any = SOAP(params, engine=engine, precondition_frequency=1)
    scale, found = torch.tensor(1024.0), torch.zeros(())
    for step in range(6):
        give_gradients(params, step)
        for p in params:
            assert p.grad is not None
            p.grad *= scale
        skipped = step in (0, 3, 4)
        if skipped:
            params[0 if step < 4 else 2].grad.view(-1)[1] = torch.inf  # type: ignore[union-attr] # it has one
        before = contents(optimizer, params)
        with torch.no_grad():
            optimizer._stepper.step(loss=LossScale(scale, found.zero_()), max_grad_norm=0.7)
        assert bool(found) == skipped
        assert same(before, contents(optimizer, params)) == skipped
    assert optimizer.param_groups[0]["updates"] == 3


@each_engine
@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_gradient_that_is_no_number_is_not_hidden(engine: str, bad: int) -> None:
    params = weights([(5, 3), (4, 4)], torch.float32)
    optimizer = SOAP(params, engine=engine, precondition_frequency=3)
    for step in range(6):
        give_gradients(params, step)
        if step == bad:
            params[0].grad[1, 1] = torch.nan  # type: ignore[index] # it has one
        optimizer.step()
    assert bool(params[0].isnan().any())
    assert bool(optimizer.state[params[0]]["q_0"].isnan().all())
    assert bool(params[1].isfinite().all())


@pytest.mark.matrix(unless=lambda engine: engine == "foreach")
@each_engine
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # raised where a generator is freed
def test_an_interrupted_step_is_taken_or_is_not(engine: str) -> None:
    """At a first gradient, at a renewal, and in between."""
    for step in (0, 1, 2):
        number, taken = 0, set()
        while True:
            params = weights([(4, 3), (4, 3), (3,)], torch.float32)
            optimizer = SOAP(params, engine=engine, precondition_frequency=2)
            straight = weights([(4, 3), (4, 3), (3,)], torch.float32)
            twin = SOAP(straight, engine=engine, precondition_frequency=2)
            train(optimizer, params, range(step))
            train(twin, straight, range(step))
            old = contents(optimizer, params)
            train(twin, straight, [step])
            give_gradients(params, step)
            if not Interrupt(number, ours)(optimizer.step):
                break
            now = contents(optimizer, params)
            is_new = same(now, contents(twin, straight))
            assert is_new or same(now, old), (step, number)
            taken.add(is_new)
            number += 83
        assert taken == {False, True}


@each_engine
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_low_precision(engine: str, rounding: Any) -> None:
    params = weights(dtype=torch.bfloat16)
    optimizer = SOAP(params, engine=engine, rounding=rounding, precondition_frequency=2, state_dtype="bfloat16")
    train(optimizer, params, range(5))
    for p in params:
        assert float(optimizer.state[p]["step"]) == (4 if p.numel() else 5)
        assert bool(p.isfinite().all())
        for name, value in optimizer.state[p].items():
            matrix = name[:2] in ("gg", "q_") or name == "step"
            assert value.dtype == (torch.float32 if matrix else torch.bfloat16), name


def test_a_basis_that_is_missing_is_not_made_up() -> None:
    params = weights([(5, 3)])
    optimizer = SOAP(params, max_precond_dim=3)
    train(optimizer, params, range(3))
    before = contents(optimizer, params)[0]
    optimizer.param_groups[0]["max_precond_dim"] = 10
    with pytest.raises(RuntimeError, match=r"parameter 0 .* its state has no gg_0"):
        train(optimizer, params, [3])
    optimizer.param_groups[0]["max_precond_dim"] = 1
    with pytest.raises(RuntimeError, match=r"parameter 0 .* its state has gg_1"):
        train(optimizer, params, [3])
    assert same(before, contents(optimizer, params)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precondition_frequency": 0}, "precondition_frequency=0"),
        ({"precondition_frequency": 2.5}, "precondition_frequency=2.5"),
        ({"max_precond_dim": 0}, "max_precond_dim=0"),
        ({"shampoo_beta": 1.0}, "shampoo_beta=1.0"),
        ({"cautious": True}, "cautious"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SOAP(weights(), **options)


def test_weights_of_too_many_dimensions() -> None:
    with pytest.raises(ValueError, match=r"parameter 0 .* shape \(1, 1, 1, 1, 1, 1\); valid: at most 5 dimensions"):
        SOAP([nn.Parameter(torch.ones(1, 1, 1, 1, 1, 1))])


def test_damaged_bases_are_refused() -> None:
    params = weights([(5, 3)])
    optimizer = SOAP(params)
    train(optimizer, params, [0])
    for value, message in ((torch.zeros(3, 3), r"q_0 has shape \(3, 3\)"), ("eye", "is a str")):
        state = optimizer.state_dict()
        state["state"] = {0: {**state["state"][0], "q_0": value}}
        with pytest.raises(ValueError, match=rf"SOAP: parameter 0: .*{message}"):
            optimizer.load_state_dict(state)


def test_what_is_only_for_element_wise_steps_says_so() -> None:
    params = weights([(5, 3)])
    optimizer: Any = SOAP(params)
    give_gradients(params, 0)
    with pytest.raises(ValueError, match="SOAP cannot be taken back"):
        optimizer._stepper.plan(undo=UndoBuffers())
    optimizer.capture_steps()
    with pytest.warns(match="SOAP is not captured as a CUDA graph"):
        optimizer.step()


def test_autocast_changes_nothing() -> None:
    ends = []
    for enabled in (False, True):
        params = weights(dtype=torch.float32)
        optimizer = SOAP(params, precondition_frequency=2)
        with torch.autocast("cpu", enabled=enabled):
            train(optimizer, params, range(4))
        ends.append(contents(optimizer, params))
    assert same(*ends)


def test_eigenvectors_of_what_is_nearly_singular(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float32 does not do, float64 does."""
    eigh, types = torch.linalg.eigh, list[torch.dtype]()

    def failing(x: Tensor) -> Any:
        types.append(x.dtype)
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(x)

    x = normal((2, 4, 4), dtype=torch.float32)
    x = x @ x.mT
    expected = eigenbases.eigenbasis(x)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    found = eigenbases.eigenbasis(x)
    assert types == [torch.float32, torch.float64]
    assert found.dtype == torch.float32
    torch.testing.assert_close((found.mT @ expected).abs(), torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-5)


def test_no_warning_in_a_run() -> None:
    params = weights(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = SOAP(params, engine="eager")
        train(optimizer, params, range(3))
