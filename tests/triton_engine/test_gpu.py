"""The Triton engine on a GPU: `pytest -m gpu tests/triton_engine`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import references
import torch
from torch import Tensor, nn

from lightning_optim.engines.scaling import LossScale
from lightning_optim.registry import OPTIMIZERS, create_optimizer

from .common import needs_triton

pytestmark = [
    needs_triton,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SHAPES: tuple[tuple[int, ...], ...] = ((257, 129), (8192 * 3,), (), (0,), (1,), (2, 3, 5, 7), (16385,))
#: Those whose step is kernels alone: between those of matrices are products in bfloat16.
KERNELS_ALONE = [name for name, info in OPTIMIZERS.items() if info.kind != "matrix"]
CASES = [(name, case) for name in KERNELS_ALONE for case in references.cases(name)]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Torch raises where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=random, dtype=torch.float64).to("cuda", dtype) for shape in SHAPES]
    return [nn.Parameter(w.to(memory_format=torch.channels_last) if w.ndim == 4 else w) for w in made]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    for index, p in enumerate(params):
        random = torch.Generator().manual_seed(1000 * step + index)
        p.grad = torch.randn(p.shape, generator=random, dtype=torch.float64).to("cuda", p.dtype)


def make(name: str, params: Any, **options: Any) -> Any:
    return create_optimizer(name, params, **{"engine": "triton", "lr": 0.02, **options})


@pytest.mark.parametrize(("name", "case"), CASES)
def test_as_the_eager_engine_in_float64(name: str, case: str) -> None:
    ours, exact = weights(), weights(torch.float64)
    options = references.cases(name)[case]
    optimizer, eager = make(name, ours, **options), make(name, exact, **{**options, "engine": "eager"})
    for step in range(20):
        give_gradients(ours, step)
        for p, q in zip(ours, exact, strict=True):
            assert p.grad is not None
            q.grad = p.grad.double()
        kept = [p.grad.clone() for p in ours if p.grad is not None]
        optimizer.step()
        eager.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, kept, strict=True) if p.grad is not None)
    assert "triton (requested)" in optimizer.engine_report()
    for p, q in zip(ours, exact, strict=True):
        # Lion's sign and the cautious mask jump, and bfloat16 state rounds: single elements may differ by a step.
        far = ((p - q).abs() > 1e-6 + 1e-6 * q.abs()).sum()
        assert far <= (
            0 if case not in ("cautious", "clip_cautious", "bfloat16_state") and name != "lion" else p.numel()
        )
        torch.testing.assert_close(p.double(), q, rtol=1e-6, atol=0.1 if far else 1e-6)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bfloat16_is_stored_as_the_eager_engine_does(name: str, rounding: str) -> None:
    ours, theirs = weights(torch.bfloat16), weights(torch.bfloat16)
    optimizer, eager = make(name, ours, rounding=rounding), make(name, theirs, rounding=rounding, engine="eager")
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        eager.step()
    differ = sum(int((p != q).sum()) for p, q in zip(ours, theirs, strict=True))
    assert differ <= 0.01 * sum(p.numel() for p in ours)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_never_waits(name: str, no_waiting: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    params = weights()
    optimizer = make(name, params, max_grad_norm=1.0)
    scale, found = torch.tensor(8.0, device="cuda"), torch.zeros((), device="cuda")
    for step in range(4):
        torch.cuda.set_sync_debug_mode("default")
        give_gradients(params, step)
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
        torch.cuda.set_sync_debug_mode("error")
        with torch.no_grad():
            optimizer._stepper.step(loss=LossScale(scale, found) if step % 2 else None)


def test_an_infinite_gradient_leaves_the_step_out() -> None:
    params = weights()
    optimizer = make("adamw", params)
    scale, found = torch.tensor(8.0, device="cuda"), torch.zeros((), device="cuda")
    give_gradients(params, 0)
    params[0].grad[3, 3] = torch.inf  # type: ignore[index] # it has one
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        optimizer._stepper.step(loss=LossScale(scale, found))
    assert found.item() == 1
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert {float(optimizer.state[p]["step"]) for p in params} == {0.0}


@pytest.mark.parametrize("name", KERNELS_ALONE)
def test_a_captured_step_is_bit_equal_for_a_hundred_steps(name: str) -> None:
    ends: list[list[Tensor]] = []
    for captured in (True, False):
        params = weights()
        optimizer = make(name, params, max_grad_norm=1.0)
        optimizer.capture_steps(captured)
        for step in range(100):
            optimizer.zero_grad(set_to_none=True)
            give_gradients(params, step)
            optimizer.param_groups[0]["lr"] = 0.02 * 0.98**step
            optimizer.step()
        ends.append([p.detach() for p in params])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_changing_the_learning_rate_compiles_nothing() -> None:
    from lightning_optim.engines import ENGINES

    params = [nn.Parameter(torch.zeros(100, device="cuda")) for _ in range(3)]
    optimizer = make("adamw", params)

    def compiled() -> int:
        kernels = [k for built in ENGINES["triton"]._kernels.values() for k in (*built.scalars, *built.sweeps)]  # type: ignore[attr-defined]
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    give_gradients(params, 0)
    optimizer.step()
    optimizer.step()
    before = compiled()
    assert before
    for change in range(1000):
        optimizer.param_groups[0]["lr"] = 1e-5 * (change + 1)
        optimizer.step()
    assert compiled() == before


@pytest.mark.slow
def test_a_tensor_of_more_than_two_to_the_31_elements() -> None:
    p = nn.Parameter(torch.zeros(2**31 + 8195, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    make("sgd", [p], lr=1.0).step()
    assert bool((p == -1).all())
