"""Clipping in a plain loop, against references of one number after the other, and against torch's own functions."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optim.control.clipping import AGC, AdaGC, Clipped, GradientClipper, NonfiniteGradientError

from .clipping_references import WAYS, AdaGCReference, agc

CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}  # float32 against float64: a few roundings of 6e-8
EACH_WAY = pytest.mark.parametrize("way", WAYS)
SHAPES: list[tuple[int, ...]] = [(5, 4), (4,), (3, 2, 2, 2), (), (1, 6)]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def fill(params: Sequence[Tensor], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def named(params: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"w{number}", p) for number, p in enumerate(params)]


def grads(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def sgd(params: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


# ---------------------------------------------------------------- what is computed


@EACH_WAY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_a_reference_over_many_steps(way: str, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    clipper, reference = GradientClipper(**WAYS[way][0]), WAYS[way][1]()
    shares = set()
    for step in range(12):
        for params in (ours, theirs):
            fill(params, step, scale=30.0 if step == 6 else 0.02 * (1 + step))
            params[1].grad = None if step % 3 else params[1].grad
        before = norm(grads(ours))
        clipped = clipper.clip(ours)
        reference(theirs)
        assert clipped is not None
        assert float(clipped.norm_before) == pytest.approx(before, rel=1e-6)
        assert float(clipped.norm_after) == pytest.approx(norm(grads(theirs)), rel=1e-5)
        shares.add(round(float(clipped.share), 3))
        for p, q in zip(ours, theirs, strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, **CLOSE)
                with torch.no_grad():
                    for one in (p, q):
                        one.sub_(0.1 * one.grad)  # type: ignore[operator]
    assert len(shares) > 1  # it clipped, and not always the same


@pytest.mark.parametrize("max_norm", [0.5, 1000.0])
def test_the_global_norm_is_torchs_bit_for_bit(max_norm: float) -> None:
    ours, theirs = parameters(), parameters()
    fill(ours, 1)
    fill(theirs, 1)
    clipped = GradientClipper(max_norm=max_norm).clip(sgd(ours))
    total = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert clipped is not None
    assert torch.equal(clipped.norm_before, total)
    assert all(torch.equal(a, b) for a, b in zip(grads(ours), grads(theirs), strict=True))
    assert float(clipped.share) == (max_norm < 1)


def test_the_norm_of_narrow_gradients() -> None:
    """Torch adds up in the gradient's own type: bfloat16 has 8 bits, and squares of float16 overflow."""
    weight = nn.Parameter(torch.zeros(10_000, dtype=torch.bfloat16))
    weight.grad = torch.full_like(weight, 1.01)
    exact = norm([weight.grad])
    assert abs(float(torch.nn.utils.get_total_norm([weight.grad])) / exact - 1) > 1e-4
    clipped = GradientClipper(max_norm=1.0).clip([weight])
    assert clipped is not None
    assert float(clipped.norm_before) == pytest.approx(exact, rel=1e-5)
    half = nn.Parameter(torch.zeros(10, dtype=torch.float16))
    half.grad = torch.full_like(half, 30_000.0)
    assert math.isinf(torch.nn.utils.get_total_norm([half.grad]))
    GradientClipper(max_norm=1.0).clip([half])
    assert norm([half.grad]) == pytest.approx(1.0, rel=1e-3)


def test_complex_gradients() -> None:
    for way in ({"max_norm": 1.0}, {"max_value": 0.5}, {"agc": 0.1}, {"adagc": 1.04}):
        weight = nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))
        weight.grad = torch.full_like(weight, 3 + 4j)
        clipped = GradientClipper(**way).clip([weight])  # type: ignore[arg-type]
        assert clipped is not None
        assert float(clipped.norm_before) == pytest.approx(5 * math.sqrt(6))
        assert float(clipped.norm_after) == pytest.approx(float(weight.grad.abs().square().sum().sqrt()))
        assert float(clipped.share) == 1.0


@EACH_WAY
def test_sparse_gradients(way: str) -> None:
    """As of the rows that the batch has; a row that occurs twice counts as one."""
    batch = torch.tensor([1, 3, 1])
    found = []
    for sparse in (True, False):
        embedding = nn.Embedding(5, 4, sparse=sparse)
        nn.init.ones_(embedding.weight)
        (embedding(batch) * torch.arange(12.0).reshape(3, 4)).sum().backward()
        GradientClipper(**WAYS[way][0]).clip(embedding.parameters())
        assert embedding.weight.grad is not None
        found.append(embedding.weight.grad.to_dense())
    torch.testing.assert_close(*found)


# ---------------------------------------------------------------- AGC


def test_agc_excludes_by_name() -> None:
    ours, theirs = parameters(), parameters()
    fill(ours, 1)
    fill(theirs, 1)
    clipper = GradientClipper(agc=AGC(clip_factor=0.1, exclude=["w2", "*1"]))
    clipper.clip(named(ours))
    agc(0.1)([theirs[0], *theirs[3:]])
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, **CLOSE)
    with pytest.raises(ValueError, match=r"AGC: exclude='head' is the name of no parameter; the names are: w0, w1"):
        GradientClipper(agc=AGC(exclude=["head"])).clip(named(ours))
    with pytest.raises(ValueError, match=r"the names are: none, as the parameters were given without names"):
        clipper.clip(ours)
    with_names = torch.optim.SGD([{"params": named(ours)}], lr=0.1)
    fill(ours, 1)
    clipper.clip(with_names)
    torch.testing.assert_close(grads(ours), grads(theirs), **CLOSE)


def test_agc_lets_units_of_zeros_learn() -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.ones(2, 3)
    GradientClipper(agc=AGC(clip_factor=0.1, eps=1e-2)).clip([weight])
    assert torch.linalg.vector_norm(weight.grad, dim=1).tolist() == pytest.approx([1e-3, 1e-3])


# ---------------------------------------------------------------- AdaGC


def adaptive(**options: Any) -> GradientClipper:
    return GradientClipper(adagc=AdaGC(**{"warmup_steps": 1} | options))


def averages(clipper: GradientClipper) -> dict[str, float]:
    return {key: float(value) for key, value in clipper.state_dict()["averages"].items()}


def ones(clipper: GradientClipper, *scales: float | None, params: list[nn.Parameter]) -> list[float]:
    """A step in which each gradient has a norm of so much; the norms after clipping."""
    for p, scale in zip(params, scales, strict=True):
        p.grad = None if scale is None else torch.full_like(p, scale / math.sqrt(p.numel()))
    clipper.clip(params)
    return [norm([gradient]) for gradient in grads(params)]


def test_a_spike_moves_neither_the_others_nor_what_follows() -> None:
    params, clipper = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(9))], adaptive(max_norm=10.0)
    ones(clipper, 0.5, 0.5, params=params)
    assert ones(clipper, 5000.0, 0.5, params=params) == pytest.approx([0.52, 0.5], rel=1e-5)
    assert averages(clipper) == pytest.approx({"0": 0.99 * 0.5 + 0.01 * 0.52, "1": 0.5}, rel=1e-5)
    # Of the global norm, all that is left after a spike is the spike.
    ones(stock := GradientClipper(max_norm=10.0), 5000.0, 0.5, params=params)
    assert norm([params[1].grad]) < 0.002  # type: ignore[list-item]
    assert stock.state_dict() == {}


@pytest.mark.parametrize("in_warmup", [True, False])
def test_no_tensor_freezes(in_warmup: bool) -> None:
    """As the first factor of LoRA, whose gradient is zero at first; by the authors' code its bound would stay zero."""
    params, clipper = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))], adaptive(warmup_steps=2)
    ones(clipper, 0.5, 0.5 if not in_warmup else 0.0, params=params)
    ones(clipper, 0.5, 0.5, params=params)
    for _ in range(500):
        ones(clipper, 0.5, 0.0, params=params)  # an expert that gets no token
    assert ones(clipper, 0.5, 0.5, params=params)[1] == pytest.approx(0.5, rel=1e-5)
    for _ in range(2000):
        ones(clipper, 0.5, 1e-9, params=params)
    floor = 0.01 * math.sqrt(4 / 8)
    assert ones(clipper, 0.5, 0.5, params=params)[1] == pytest.approx(1.04 * floor, rel=1e-3)


def test_the_authors_code_freezes_a_tensor_that_begins_with_zero() -> None:
    """What the floor, and leaving zeros out, are for."""
    weight, frozen = nn.Parameter(torch.ones(4)), AdaGCReference(warmup_steps=1, floor=0.0)
    frozen.averages = {0: 0.0}  # the least norm of the warm-up, with zeros in it
    frozen.steps = 1
    for _ in range(100):
        weight.grad = torch.ones(4)
        frozen([weight])
    assert norm(grads([weight])) == 0.0


def test_a_tensor_that_comes_late_is_bounded_too() -> None:
    params, clipper = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))], adaptive(max_norm=2.0)
    ones(clipper, 1.0, None, params=params)
    assert ones(clipper, 1.0, 100.0, params=params)[1] == pytest.approx(2.0, rel=1e-5)
    assert ones(clipper, 1.0, 100.0, params=params)[1] == pytest.approx(2.08, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("steps", [0, 3])
def test_gradients_that_are_not_finite_leave_no_trace(bad: float, steps: int) -> None:
    params, clipper = parameters(), adaptive(warmup_steps=2)
    for step in range(steps):
        fill(params, step)
        clipper.clip(params)
    before = clipper.state_dict()
    fill(params, 7)
    params[0].grad[0, 0] = bad  # type: ignore[index]
    clipper.clip(params)
    assert not torch.isfinite(params[0].grad).all()  # type: ignore[arg-type] # for a rollback or a scaler to see
    after = clipper.state_dict()
    assert torch.equal(after["steps"], before["steps"])
    known = {key: value for key, value in after["averages"].items() if not value.isnan()}
    assert known == before["averages"]


def test_resuming_bit_for_bit() -> None:
    straight, first = adaptive(warmup_steps=2), adaptive(warmup_steps=2)
    second = adaptive(warmup_steps=2)
    found, expected = parameters(), parameters()
    for step in range(8):
        if step == 4:
            file = io.BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            second.load_state_dict(torch.load(file, weights_only=True))
        for params, clipper in ((expected, straight), (found, first if step < 4 else second)):
            fill(params, step, scale=1 + step % 3)
            clipper.clip(named(params))
        assert all(torch.equal(a, b) for a, b in zip(grads(found), grads(expected), strict=True))
    assert copy.deepcopy(second).state_dict() == second.state_dict()
    with pytest.raises(ValueError, match="the state is that of AdaGC, and adagc=None"):
        GradientClipper(max_norm=1.0).load_state_dict(second.state_dict())


# ---------------------------------------------------------------- gradients that are not finite, and loss scalers


@EACH_WAY
def test_error_if_nonfinite(way: str) -> None:
    params = parameters()
    clipper = GradientClipper(**WAYS[way][0], error_if_nonfinite=True)
    fill(params, 1)
    clipper.clip(named(params))
    fill(params, 2)
    params[1].grad[0], params[3].grad[...] = math.nan, math.inf  # type: ignore[index]
    before = [gradient.clone() for gradient in grads(params)]
    with pytest.raises(NonfiniteGradientError, match=r"infinite or NaN: those of w1, w3 \(of 5 parameters\)"):
        clipper.clip(named(params))
    torch.testing.assert_close(grads(params), before, rtol=0, atol=0, equal_nan=True)
    assert GradientClipper(**WAYS[way][0]).clip(params) is not None  # it is off unless asked for


def test_a_norm_that_overflows() -> None:
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.full((4,), 3e38)
    with pytest.raises(NonfiniteGradientError, match="the gradients are finite, but the sum of their squares is not"):
        GradientClipper(max_norm=1.0, error_if_nonfinite=True).clip([weight])


@EACH_WAY
@pytest.mark.parametrize("unscaled", [True, False])
def test_scaled_gradients_are_unscaled_first(way: str, unscaled: bool) -> None:
    params, expected = parameters(), parameters()
    optimizer, scaler = sgd(params), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    fill(params, 1, scale=1024.0)
    fill(expected, 1)
    if unscaled:
        scaler.unscale_(optimizer)
    GradientClipper(**WAYS[way][0]).clip(optimizer, scaler=scaler)
    WAYS[way][1]()(expected)
    torch.testing.assert_close(grads(params), grads(expected), **CLOSE)
    scaler.step(optimizer)  # as if `unscale_` had been called
    scaler.update()


def test_steps_that_a_scaler_skips_raise_nothing() -> None:
    params = parameters()
    optimizer, scaler = sgd(params), torch.amp.GradScaler("cpu", init_scale=1024.0)
    clipper = GradientClipper(adagc=AdaGC(warmup_steps=0), error_if_nonfinite=True)
    for bad, scale in ((False, 1024.0), (True, 512.0), (False, 512.0)):
        scaler.scale(torch.ones(()))
        fill(params, 1)
        if bad:
            params[0].grad[0, 0] = math.inf  # type: ignore[index]
        clipper.clip(optimizer, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
    assert int(clipper.state_dict()["steps"]) == 2
    with pytest.raises(TypeError, match=r"needs the optimizer, whose gradients the scaler unscales; valid"):
        clipper.clip(params, scaler=scaler)


# ---------------------------------------------------------------- and the rest


class _ReadsNothing(TorchDispatchMode):
    """Fails where a number would be read back from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        assert func is not torch.ops.aten.nonzero.default
        return func(*args, **kwargs or {})


@EACH_WAY
def test_nothing_is_read_back_from_the_device(way: str) -> None:
    params = parameters()
    clipper = GradientClipper(**WAYS[way][0])
    for step in range(4):
        fill(params, step, scale=3.0)
        with _ReadsNothing():
            clipped = clipper.clip(named(params))
    with pytest.raises(AssertionError), _ReadsNothing():
        float(clipped.norm_before)  # type: ignore[union-attr]


def test_what_is_measured() -> None:
    params = parameters()
    fill(params, 1)
    assert GradientClipper(max_value=0.1).clip(params, measure=False) is None
    assert max(float(gradient.abs().max()) for gradient in grads(params)) == pytest.approx(0.1)
    for p in params:
        p.grad = None
    assert GradientClipper(max_norm=1.0).clip(params) is None
    clipped = Clipped.to_norm(torch.tensor(4.0), 1.0)
    assert [float(number) for number in vars(clipped).values()] == pytest.approx([4.0, 1.0, 1.0], rel=1e-6)


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, r"GradientClipper: none of them; valid: exactly one of max_norm, max_value, agc, adagc"),
    ({"max_norm": 1.0, "agc": 0.01}, r"max_norm=1.0, agc=0.01; valid: exactly one of"),
    ({"max_norm": -1.0}, r"GradientClipper: max_norm=-1.0; valid: a finite number > 0, None"),
    ({"max_value": "big"}, r"max_value='big' is a str; valid"),
    ({"max_norm": math.inf}, r"max_norm=inf; valid"),
    ({"agc": 0.0}, r"AGC: clip_factor=0.0; valid: a finite number > 0"),
    ({"agc": True}, r"agc=True; valid: a number \(clip_factor\), or AGC\(clip_factor=...\)"),
    ({"adagc": 1.0}, r"AdaGC: ratio=1.0; valid: a finite number > 1"),
    ({"adagc": "on"}, r"adagc='on'; valid: a number \(ratio\)"),
    ({"max_norm": 1.0, "error_if_nonfinite": 1}, r"error_if_nonfinite=1 is not a bool"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientClipper(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AGC(exclude="head"), r"AGC: exclude='head'; valid: a list of names or patterns"),
        (lambda: AGC(eps=0), r"AGC: eps=0; valid"),
        (lambda: AdaGC(beta=1.0), r"AdaGC: beta=1.0; valid: a number in \[0, 1\)"),
        (lambda: AdaGC(warmup_steps=-1), r"AdaGC: warmup_steps=-1; valid: a whole number >= 0"),
        (lambda: AdaGC(floor=2.0), r"AdaGC: floor=2.0; valid: a number in \[0, 1\]"),
    ],
)
def test_bad_options_of_the_ways(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_of_numpy() -> None:
    assert GradientClipper(max_norm=np.float64(0.5)).max_norm == 0.5
    assert GradientClipper(adagc=np.float64(1.5)).adagc == AdaGC(1.5)
