"""Steps of matrices: the reference, torch's Muon, batches, memory, and control over both kinds."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import references
import torch
from torch import Tensor, nn

from lightning_optim import Muon
from lightning_optim.control.step_in_backward import StepInBackward
from lightning_optim.engines import newton_schulz

from .common import each_engine, give_gradients, muon, normal, train, weights

# Sums over singular values are done in another order, in float64.
CLOSE: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}

needs_torchs = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@each_engine
@pytest.mark.parametrize(
    "options", [{}, {"stacked": False}, {"ns_coefficients": "polar_express", "adjust_lr": "match_rms_adamw"}], ids=str
)
def test_fifty_steps_of_all_shapes_are_the_references(engine: str, options: dict[str, Any]) -> None:
    params = weights()
    exact: list[tuple[Tensor, dict[str, Tensor]]] = [(p.detach().clone(), {}) for p in params]
    optimizer = muon(params, engine=engine, **options)
    for step in range(50):
        if step == 20:
            fresh = muon(params, engine=engine, lr=0.9)
            fresh.load_state_dict(optimizer.state_dict())
            optimizer = fresh
        train(optimizer, params, [step])
        for index, p in enumerate(params):
            assert p.grad is not None
            exact[index] = references.step("muon", exact[index][0], p.grad, exact[index][1], optimizer.param_groups[0])
            torch.testing.assert_close(p.detach(), exact[index][0], **CLOSE)
            momentum = optimizer.state[p]["momentum_buffer"]
            torch.testing.assert_close(momentum, exact[index][1]["momentum_buffer"], **CLOSE)


@needs_torchs
@each_engine
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_torchs_muon_without_its_bfloat16(
    engine: str, adjust: str, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights at each step; at the tenth, its state goes on in ours."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)  # in which torch multiplies
    shapes = [(5, 9), (9, 5), (9, 5), (7, 7)]
    ours, theirs = weights(shapes), weights(shapes)
    options: dict[str, Any] = {"lr": 0.05, "momentum": 0.8, "nesterov": nesterov, "weight_decay": 0.2}
    optimizer = muon(ours, engine=engine, adjust_lr=adjust, **options)
    twin = torch.optim.Muon(theirs, adjust_lr_fn=adjust, **options)
    for step in range(20):
        if step == 10:
            optimizer = muon(ours, engine=engine)
            optimizer.load_state_dict(twin.state_dict())
        train(optimizer, ours, [step])
        train(twin, theirs, [step])
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, **CLOSE)


@needs_torchs
def test_torchs_muon_as_it_is() -> None:
    ours, theirs = weights([(33, 65), (65, 33)], torch.float32), weights([(33, 65), (65, 33)], torch.float32)
    optimizer, twin = muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02)
    for step in range(3):
        train(optimizer, ours, [step])
        train(twin, theirs, [step])
    for p, q, start in zip(ours, theirs, weights([(33, 65), (65, 33)], torch.float32), strict=True):
        # bfloat16 has 8 bits, and five steps with slopes of up to 3.4 lose a few.
        assert (p - q).norm() < 0.05 * (p - start).norm()


@needs_torchs
def test_another_state_of_torchs_is_refused() -> None:
    params = weights([(3, 3)])
    state = torch.optim.Muon(params, ns_coefficients=(3.0, -4.0, 2.0)).state_dict()
    with pytest.raises(ValueError, match=r"saved with ns_coefficients=\(3\.0, -4\.0, 2\.0\)"):
        muon(params).load_state_dict(state)


@each_engine
def test_batches_are_their_matrices_one_by_one(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = weights(), weights()
    optimizer, single = muon(together, engine=engine), [muon([p], engine=engine) for p in apart]
    batches: list[int] = []
    orthogonalize = newton_schulz.orthogonalize

    def noting(x: Tensor, **options: Any) -> Tensor:
        batches.append(len(x))
        return orthogonalize(x, **options)

    for step in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(newton_schulz, "orthogonalize", noting)
            train(optimizer, together, [step])
        give_gradients(apart, step)
        for one in single:
            one.step()
        for p, q in zip(together, apart, strict=True):
            torch.testing.assert_close(p, q, **CLOSE)
    assert batches == [1, 3, 1, 1, 3] * 3  # of (9, 5) and of the stack there are three


def in_memory_like(p: Tensor, order: str) -> Tensor:
    if order == "reversed":
        return p.permute(*reversed(range(p.ndim))).contiguous().permute(*reversed(range(p.ndim)))
    if order == "second dimension outermost":
        return p.transpose(0, 1).contiguous().transpose(0, 1)
    if order == "channels last":
        return p.movedim(1, -1).contiguous().movedim(-1, 1)
    return torch.stack([p, p], dim=-1)[..., 0]  # with gaps


@each_engine
@pytest.mark.parametrize("order", ["reversed", "second dimension outermost", "channels last", "gaps"])
@pytest.mark.filterwarnings("ignore:.*weights have gaps:lightning_optim.warnings.LightningOptimWarning")
def test_memory_order_does_not_matter(engine: str, order: str) -> None:
    expected = weights()
    params = [nn.Parameter(in_memory_like(p.detach(), order)) for p in expected]
    optimizer, plain = muon(params, engine=engine), muon(expected, engine=engine)
    for step in range(3):
        train(plain, expected, [step])
        train(optimizer, params, [step])
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, **CLOSE)


def test_directions_go_straight_into_their_batch() -> None:
    """Nothing is copied where a weight's memory is a matrix: contiguous, transposed, or with its columns permuted."""
    params = [
        *weights(),
        nn.Parameter(normal((5, 9), 1).t()),
        nn.Parameter(in_memory_like(normal((4, 2, 3, 3), 2), "channels last")),
    ]
    optimizer: Any = muon(params)
    give_gradients(params, 0)
    assert optimizer._stepper.plan()
    batches = optimizer._stepper._batches
    assert [batch.staged for batch in batches] == [{}] * len(batches)
    assert sum(len(batch.weights) for batch in batches) == len(params)
    memory = [weakref.ref(batch.directions) for batch in batches]
    (transposed,) = [b for b in batches if any(p is params[-2] for p, _ in b.weights)]
    assert transposed.kind.shape == (5, 9)
    del batches, transposed
    optimizer._stepper.run(None)
    assert [tensor() for tensor in memory] == [None] * len(memory)


def test_both_kinds_are_clipped_by_one_norm() -> None:
    model = nn.Linear(6, 6)
    optimizer = Muon(model.named_parameters(), max_grad_norm=0.1)
    give_gradients(model.parameters(), 0)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    assert optimizer.grad_norm is not None
    torch.testing.assert_close(float(optimizer.grad_norm), float(norm), rtol=1e-6, atol=0)
    assert model.bias.grad is not None
    average = optimizer.state[model.bias]["exp_avg"]
    torch.testing.assert_close(average, 0.1 * model.bias.grad * 0.1 / norm, rtol=1e-5, atol=1e-8)
    # A direction has no length, but the momentum does.
    assert model.weight.grad is not None
    momentum = optimizer.state[model.weight]["momentum_buffer"]
    torch.testing.assert_close(momentum, 0.05 * model.weight.grad * 0.1 / norm, rtol=1e-5, atol=1e-8)


@each_engine
def test_either_kind_may_have_no_gradients(engine: str) -> None:
    model = nn.Linear(4, 4)
    optimizer = Muon(model.named_parameters(), engine=engine, max_grad_norm=1.0)
    for step, (weight, bias) in enumerate([(True, True), (True, False), (False, True), (False, False), (True, True)]):
        give_gradients(model.parameters(), step)
        model.weight.grad = model.weight.grad if weight else None
        model.bias.grad = model.bias.grad if bias else None
        before = [p.detach().clone() for p in (model.weight, model.bias)]
        optimizer.step()
        moved = [not torch.equal(p, q) for p, q in zip((model.weight, model.bias), before, strict=True)]
        assert moved == [weight, bias]
    assert float(optimizer.state[model.bias]["step"]) == 3


@each_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stochastic_rounding_counts_each_step_once(engine: str, dtype: torch.dtype) -> None:
    """Where the state and the weight are rounded by two Programs, and where only one of them is."""
    params = weights([(5, 9)], dtype)
    optimizer = muon(params, engine=engine, rounding="stochastic", state_dtype="bfloat16")
    train(optimizer, params, range(3))
    assert float(optimizer.state[params[0]]["step"]) == 3


def test_state_has_torchs_keys() -> None:
    model = nn.Linear(3, 3)
    optimizer = Muon(model.named_parameters())
    train(optimizer, list(model.parameters()), [0])
    assert set(optimizer.state[model.weight]) == {"momentum_buffer"}
    assert set(optimizer.state[model.bias]) == {"step", "exp_avg", "exp_avg_sq"}


def test_damaged_momentum_is_refused() -> None:
    params = weights([(3, 4)])
    optimizer = muon(params)
    train(optimizer, params, [0])
    for value, message in ((torch.zeros(4, 3), r"momentum_buffer has shape \(4, 3\)"), ("zeros", "is a str")):
        state = optimizer.state_dict()
        state["state"] = {0: {"momentum_buffer": value}}
        with pytest.raises(ValueError, match=rf"Muon: parameter 0: .*{message}"):
            optimizer.load_state_dict(state)


def test_a_state_for_other_kinds_is_refused() -> None:
    """Groups say which rule their state is of: a vector has no state of a matrix."""
    params = [nn.Parameter(torch.zeros(3))]
    state = Muon([{"params": params, "use_muon": False}]).state_dict()
    state["param_groups"][0]["use_muon"] = True
    with pytest.raises(ValueError, match="use_muon=True with parameter 0"):
        Muon(params).load_state_dict(state)


def test_the_report_names_all_parts() -> None:
    model = nn.Linear(3, 3)
    optimizer = Muon(model.named_parameters(), engine="eager")
    before = optimizer.engine_report()
    train(optimizer, list(model.parameters()), [0])
    for report in (before, optimizer.engine_report()):
        for part in ("Muon, 1 tensors", "Muon's moves, 1 tensors", "Muon's AdamW, 1 tensors"):
            assert part in report


def test_what_is_only_for_element_wise_steps_says_so() -> None:
    model = nn.Linear(3, 3)
    optimizer = Muon(model.named_parameters())
    with pytest.raises(TypeError, match="does not step parameter by parameter"):
        StepInBackward(optimizer)
    optimizer.capture_steps()
    give_gradients(model.parameters(), 0)
    with pytest.warns(match="Muon is not captured as a CUDA graph"):
        optimizer.step()
