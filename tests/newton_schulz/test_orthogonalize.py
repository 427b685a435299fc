"""Newton–Schulz orthogonalization against a singular value decomposition in float64; its Triton kernel as far as no GPU
is needed: in the interpreter, and compiled for one."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optim.engines import newton_schulz
from lightning_optim.engines.newton_schulz import _POLAR_EXPRESS, MUON, Triple, orthogonalize, polar_express
from lightning_optim.warnings import LightningOptimWarning

SHAPES = [(6, 6), (5, 9), (9, 5), (7, 1), (1, 7), (1, 1), (33, 17), (3, 12, 31), (4, 31, 12), (2, 8, 8), (3, 5, 1)]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_singular_values(values: Tensor, rows: int, columns: int) -> Tensor:
    u, _ = torch.linalg.qr(normal(rows, len(values), seed=1))
    v, _ = torch.linalg.qr(normal(columns, len(values), seed=2))
    return u @ values.diag() @ v.mT


def polynomial(values: Tensor, schedule: Sequence[Triple]) -> Tensor:
    for a, b, c in schedule:
        values = a * values + b * values**3 + c * values**5
    return values


def by_svd(x: Tensor, schedule: Sequence[Triple]) -> Tensor:
    """What the iteration is, in exact arithmetic: a polynomial of the singular values."""
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    return u @ (polynomial(s, schedule).unsqueeze(-1) * vt)


def by_definition(x: Tensor, schedule: Sequence[Triple]) -> Tensor:
    """The iteration as it is written in the paper, one matrix, never transposed."""
    x = x / x.square().sum().sqrt()
    for a, b, c in schedule:
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("schedule", [(MUON,) * 5, polar_express(7)], ids=["muon", "polar_express"])
def test_float64(shape: tuple[int, ...], schedule: tuple[Triple, ...]) -> None:
    x = normal(*shape)
    out = orthogonalize(x, steps=len(schedule), coefficients=schedule)
    assert out.dtype == torch.float64
    assert out.is_contiguous()
    # The slope at 0 of all steps together, 3.4⁵ = 485 for Muon and 3,700 for Polar Express, multiplies rounding.
    torch.testing.assert_close(out, by_svd(x, schedule), rtol=0, atol=1e-11)
    for matrix, expected in zip(out.view(-1, *shape[-2:]), x.view(-1, *shape[-2:]), strict=True):
        torch.testing.assert_close(matrix, by_definition(expected, schedule), rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("storage", "dtype", "atol"),
    [
        (torch.float32, None, 1e-4),  # 485 times float32's 6e-8, and some: see above
        (torch.bfloat16, None, 5e-3),  # computed in float32, stored with 2⁻⁹
        (torch.float16, torch.float32, 1e-3),
        (torch.float64, torch.float32, 1e-4),
        (torch.float32, torch.float64, 1e-7),
    ],
)
def test_dtypes(shape: tuple[int, ...], storage: torch.dtype, dtype: torch.dtype | None, atol: float) -> None:
    x = normal(*shape).to(storage)
    before = x.clone()
    out = orthogonalize(x, dtype=dtype)
    assert (out.dtype, out.shape) == (x.dtype, x.shape)
    assert torch.equal(x, before)
    torch.testing.assert_close(out.double(), by_svd(x, (MUON,) * 5), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 40), (40, 70), (70, 40)])
def test_singular_values_end_in_the_band_of_muon(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    # Of the Frobenius norm, 0.01 to 0.3.
    values = torch.logspace(-1.5, 0, min(shape), dtype=torch.float64)
    out = torch.linalg.svdvals(orthogonalize(with_singular_values(values, *shape), dtype=dtype))
    slack = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 0.03}[dtype]
    assert out.min() > 0.6818 - slack
    assert out.max() < 1.1344 + slack


@pytest.mark.parametrize(("steps", "low", "high"), [(5, 0.846, 1.124), (6, 0.994, 1.002), (8, 1 - 1e-12, 1 + 1e-12)])
def test_polar_express_converges(steps: int, low: float, high: float) -> None:
    values = torch.logspace(-2.6, 0, 24, dtype=torch.float64)
    x = with_singular_values(values, 30, 24)
    assert values.min() / values.norm() > 1e-3
    out = torch.linalg.svdvals(orthogonalize(x, steps=steps, coefficients=polar_express(steps)))
    assert low < out.min() < out.max() < high


def test_polar_express_is_the_papers() -> None:
    """Each row anew, by the exchange algorithm: of all odd quintics the nearest to 1 on the range reached so far."""
    low, high = 1e-3, 1.0
    for row in _POLAR_EXPRESS[:-1]:
        left = max(low, 0.02407327424182761 * high)  # the paper's cushion
        points = torch.linspace(left, high, 4, dtype=torch.float64)
        for _ in range(40):
            # The error is the same, with alternating sign, at both ends and at the two turning points.
            signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
            system = torch.stack([points, points**3, points**5, signs], dim=1)
            a, b, c, _ = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
            root = (9 * b * b - 20 * a * c) ** 0.5
            turns = [((-3 * b - sign * root) / (10 * c)) ** 0.5 for sign in (1, -1)]
            points = torch.tensor([left, *turns, high], dtype=torch.float64)
        ends = polynomial(torch.tensor([low, high], dtype=torch.float64), [(a, b, c)])
        center = 2 / ends.sum().item()  # the cushion's part of the range, too, shall end around 1
        # The four points draw together: their system loses digits.
        assert row == pytest.approx((a * center, b * center, c * center), rel=1e-7)
        low = ends[0].item() * center
        high = 2 - low
    limit = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(polynomial(limit, _POLAR_EXPRESS[-1:]), limit, create_graph=True)[0]
    curvature = torch.autograd.grad(slope, limit)[0]
    assert (polynomial(limit, _POLAR_EXPRESS[-1:]).item(), slope.item(), curvature.item()) == (1, 0, 0)


def test_the_last_polynomial_repeats() -> None:
    assert polar_express(10)[7:] == (_POLAR_EXPRESS[-1],) * 3
    assert polar_express(3) == polar_express(10)[:3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 12, 31), (4, 31, 12), (4, 16, 16)])
def test_a_batch_is_its_matrices(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (normal(*shape) * torch.logspace(-6, 6, shape[0], dtype=torch.float64)[:, None, None]).to(torch.float32)
    out = orthogonalize(x, dtype=dtype)
    # Not to the bit: BLAS may sum in another order for another number of matrices.
    atol = {torch.float32: 1e-4, torch.float64: 1e-7, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(out, torch.stack([orthogonalize(m, dtype=dtype) for m in x]), rtol=0, atol=atol)


def test_tall_is_the_transpose_of_wide() -> None:
    x = normal(3, 20, 7)
    torch.testing.assert_close(orthogonalize(x), orthogonalize(x.mT).mT, rtol=0, atol=1e-11)
    strided = normal(20, 14)[::2, ::2].T
    torch.testing.assert_close(orthogonalize(strided), orthogonalize(strided.clone()), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_matrices_give_zeros(dtype: torch.dtype) -> None:
    x = normal(3, 6, 4).float()
    x[1] = 0
    out = orthogonalize(x, dtype=dtype)
    assert torch.equal(out[1], torch.zeros(6, 4))
    torch.testing.assert_close(out[::2], orthogonalize(x[::2], dtype=dtype), rtol=0, atol=0.05)
    assert not torch.isnan(out).any()


def test_not_a_number_stays_in_its_matrix() -> None:
    x = normal(3, 6, 4)
    x[1, 2, 3] = torch.nan
    out = orthogonalize(x)
    assert torch.isnan(out[1]).all()
    assert not torch.isnan(out[::2]).any()


def test_only_ratios_matter_down_to_eps() -> None:
    x = normal(4, 6).float()
    torch.testing.assert_close(orthogonalize(x * 1e-6), orthogonalize(x), rtol=0, atol=1e-4)
    assert orthogonalize(x * 1e-12).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 3), (2, 3, 0), (3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert orthogonalize(torch.empty(shape)).shape == shape


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.ones(3), {}, r"x has shape \(3,\); valid: \(batch, rows, columns\) or \(rows, columns\)"),
        (torch.ones(1, 2, 3, 4), {}, "x has shape"),
        (torch.ones(2, 2, dtype=torch.int64), {}, "x is torch.int64; valid: torch.bfloat16, "),
        (torch.ones(2, 2, dtype=torch.complex64), {}, "x is torch.complex64"),
        (torch.ones(2, 2), {"dtype": torch.int32}, "dtype is torch.int32; valid: "),
        (torch.ones(2, 2), {"steps": 0}, "steps=0 must be at least 1"),
        (torch.ones(2, 2), {"eps": 0.0}, r"eps=0.0 must be positive"),
        (torch.ones(2, 2), {"coefficients": polar_express(4)}, "4 triples for steps=5; valid: one, or one per step"),
        (torch.ones(2, 2), {"coefficients": (1.5, -0.5)}, r"coefficients has \(1.5, -0.5\) for one step"),
        (torch.ones(2, 2), {"coefficients": [MUON, (1.0, 2.0)], "steps": 2}, r"coefficients has \(1.0, 2.0\) for one"),
        (torch.ones(2, 2), {"products": "cublas"}, "products='cublas' is unknown; valid: auto, torch, triton"),
    ],
)
def test_errors(x: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthogonalize(x, **options)


def test_no_steps_of_polar_express() -> None:
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        polar_express(0)


class Products(TorchDispatchMode):
    """The types in which matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "bmm" in str(func):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_on_cuda_products_are_in_bfloat16_and_nothing_waits(storage: torch.dtype) -> None:
    """On tensors that have no values: whatever would read one, raises."""
    with FakeTensorMode(), Products() as seen:
        x = torch.empty(2, 12, 31, device="cuda", dtype=storage)
        out = orthogonalize(x)
    assert seen.dtypes == {torch.bfloat16}
    assert (out.dtype, out.device.type) == (storage, "cuda")


def test_compiles_whole() -> None:
    x = normal(9, 4).float()
    compiled = torch.compile(orthogonalize, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), orthogonalize(x))


def test_autocast_changes_nothing() -> None:
    x = normal(2, 9, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = orthogonalize(x)
    assert torch.equal(out, orthogonalize(x))


def test_devices_without_autocast() -> None:
    assert orthogonalize(torch.empty(3, 4, device="meta")).shape == (3, 4)


def test_triton_is_imported_only_when_used() -> None:
    code = (
        "import sys, torch, lightning_optim\n"
        "from lightning_optim.engines.newton_schulz import orthogonalize\n"
        "orthogonalize(torch.ones(2, 3))\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@needs_triton
def test_triton_wants_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_optim.engines.triton import symmetric

    monkeypatch.setattr(symmetric, "INTERPRETED", False)
    with pytest.raises(ValueError, match="products='triton' cannot be: the tensor is on cpu"):
        orthogonalize(torch.ones(2, 2), products="triton")


@needs_triton
def test_where_the_kernel_cannot_run_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: Any) -> Tensor:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(newton_schulz, "_triton_pays", lambda x: True)
    monkeypatch.setattr("lightning_optim.engines.triton.symmetric.symmetric_product", launch)
    monkeypatch.setattr("lightning_optim.warnings._seen", set())
    newton_schulz._triton_fails.cache_clear()
    x = normal(2, 4, 5)
    with pytest.warns(LightningOptimWarning, match=r"symmetric products cannot be used \(no C compiler\)") as warned:
        out = [orthogonalize(x) for _ in range(2)]
    newton_schulz._triton_fails.cache_clear()
    assert len(warned) == 1
    assert torch.equal(out[0], orthogonalize(x, products="torch"))


@needs_triton
def test_the_kernel_in_the_interpreter(tmp_path: Path) -> None:
    cases = Path(__file__).with_name("interpreted.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", f"cache_dir={tmp_path}", cases],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    skipped = re.search(r"^SKIPPED .*", result.stdout, re.MULTILINE)
    if skipped:
        pytest.skip(skipped[0])
    assert re.search(r"\d+ passed", result.stdout), result.stdout


@needs_triton
@pytest.mark.matrix(unless=lambda addend: addend)
@pytest.mark.parametrize("addend", [False, True])
@pytest.mark.parametrize("unit", ["x_column", "x_row"])
def test_the_kernel_compiled_for_sm_90(
    addend: bool, unit: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ahead of time, as "auto" launches it: bfloat16, sizes that are multiples of 16, row- or column-major."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_optim.engines.triton import symmetric

    if symmetric.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    kernel = symmetric.symmetric_kernel
    constants = {
        "HAS_ADDEND": addend,
        "PRECISION": "tf32",
        "BLOCK": symmetric.BLOCK,
        "DEPTH": symmetric.DEPTH_BYTES // 2,
        unit: 1,
    }
    types = dict.fromkeys(("x", "addend", "out"), "*bf16") | {"alpha": "fp32", "beta": "fp32", "x_matrix": "i64"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    divisible = [i for i, name in enumerate(names) if signature[name] in ("*bf16", "i32", "i64")]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in divisible}),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": symmetric.WARPS, "num_stages": symmetric.STAGES, "enable_fp_fusion": True},
    )
    ptx = compiled.asm["ptx"]
    assert re.search(r"wgmma\.mma_async\S*\.f32\.bf16\.bf16", ptx)
    assert re.search(r"cp\.async\.\w+\.shared\.global[^;]*, 0x10", ptx)  # 16 bytes at once
    assert not re.search(r"st\.global(?!\S*\.v4)", ptx)
    assert compiled.metadata.shared <= 99 * 1024  # what GPUs of compute capability 8.6 and 8.9 have
    assert len(compiled.asm["cubin"]) > 0
    machine_code = compiled.asm["sass"]
    assert "HGMMA" in machine_code
    assert not re.search(r"\b(STL|LDL)\b", machine_code)  # nothing spilled to local memory


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnGPU:
    @pytest.mark.parametrize("products", ["torch", "triton", "auto"])
    @pytest.mark.parametrize("shape", [(3, 128, 384), (2, 384, 128), (2, 256, 256), (301, 257), (1, 1024, 1536)])
    def test_products(self, products: Any, shape: tuple[int, ...]) -> None:
        x = normal(*shape).float().cuda()
        orthogonalize(x, products=products)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = orthogonalize(x, products=products)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # Of each matrix, as a whole: five steps in bfloat16.
        expected = by_svd(x.cpu(), (MUON,) * 5)
        error = torch.linalg.matrix_norm(out.cpu().double() - expected) / torch.linalg.matrix_norm(expected)
        assert error.max() < 0.03

    @needs_triton
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("shape", [(1, 1, 1), (2, 127, 65), (3, 129, 33), (2, 384, 512), (5, 640, 64)])
    def test_kernel(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        from lightning_optim.engines.triton.symmetric import symmetric_product

        for x in (normal(*shape).to("cuda", dtype), normal(*shape).to("cuda", dtype).mT.contiguous().mT):
            a = symmetric_product(x)
            assert torch.equal(a, a.mT)
            exact = x.double() @ x.double().mT
            rtol = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-5}[dtype]
            torch.testing.assert_close(a.double(), exact, rtol=rtol, atol=1e-3)
            both = symmetric_product(x, a, alpha=0.5, beta=-2.0)
            torch.testing.assert_close(both.double(), 0.5 * exact - 2 * a.double(), rtol=rtol, atol=5e-3)
