"""Newton–Schulz orthogonalization of batches of matrices, by matrix products alone.

Muon replaces an update ``X = U Σ Vᵀ`` by (nearly) its polar factor ``U Vᵀ``. An odd polynomial of a matrix acts on its
singular values only, so a few steps of

    ``X ← a X + (b A + c A A) X``  with  ``A = X Xᵀ``

with well-chosen ``(a, b, c)`` bring them all near 1, without a decomposition and in low precision. Where ``X`` has more
rows than columns, its transpose takes its place, so that ``A`` is as small as can be. ``A`` and ``b A + c A A`` are
symmetric: :mod:`lightning_optim.engines.triton.symmetric` computes half of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_optim.engines.ambient import no_autocast
from lightning_optim.rules.matrix import Group, Stack, Transform
from lightning_optim.warnings import warn_once

#: ``(a, b, c)`` of the polynomial ``a x + b x³ + c x⁵`` of one step.
Triple = tuple[float, float, float]

#: What computes the symmetric products.
Products = Literal["auto", "torch", "triton"]

#: ``x xᵀ`` of a batch, or ``beta · addend + alpha · x xᵀ`` for a symmetric ``addend``.
SymmetricProduct = Callable[..., Tensor]

#: Muon's coefficients (Jordan et al., 2024): the steepest slope at 0 for which no singular value leaves a band around
#: 1. They never settle: five steps take singular values from 0.01 to 1 (of the Frobenius norm) into 0.682 to 1.134.
MUON: Triple = (3.4445, -4.7750, 2.0315)

#: Each step's polynomial is the one nearest to 1 on the range into which the steps before it have brought singular
#: values of 0.001 to 1, that range being cut at 0.024 of its upper end (Amsel et al., Algorithm 1; a test derives the
#: numbers anew). The last row repeats.
_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

#: Above their range these polynomials explode, so each but the last is given its argument divided by this: room for
#: the rounding of bfloat16 (the paper's own number).
_POLAR_EXPRESS_SAFETY = 1.01

#: From this Gram size on, and for sizes that are multiples of the other number, "auto" takes the Triton kernel on CUDA:
#: below, a few large blocks leave most of a GPU idle; odd strides rule out 16-byte copies. Not measured: until a
#: benchmark has been run on a GPU, 1024 is a guess (eight blocks of 128 a side, so 36 products instead of 64).
TRITON_MIN_ROWS = 1024
TRITON_MULTIPLE = 16

_STORAGE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def polar_express(steps: int) -> tuple[Triple, ...]:
    """The first ``steps`` polynomials of Polar Express: one triple per step, for :func:`orthogonalize`.

    Unlike :data:`MUON`'s they converge: singular values of 0.001 to 1 (of the Frobenius norm) end between 0.84 and
    1.13 after five steps, between 0.994 and 1.002 after six.

    Raises:
        ValueError: ``steps`` is less than 1.

    References:
        Amsel, Persson, Musco, Gower, The Polar Express: Optimal Matrix Sign Methods and Their Application to the Muon
        Algorithm, arXiv:2505.16932. There the matrix, too, is divided by 1.01; here only the polynomials' arguments.

    >>> [round(a, 2) for a, b, c in polar_express(3)]
    [8.21, 4.07, 3.91]
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    s = _POLAR_EXPRESS_SAFETY
    safe = tuple((a / s, b / s**3, c / s**5) for a, b, c in _POLAR_EXPRESS[:-1])
    return (safe + _POLAR_EXPRESS[-1:] * (steps - len(safe)))[:steps]


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    *,
    steps: int = 5,
    coefficients: Triple | Sequence[Triple] = MUON,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    products: Products = "auto",
) -> Tensor:
    """The polar factor of each matrix, approximately: the same singular vectors, singular values near 1.

    A matrix of zeros gives zeros; directions in which it is (nearly) singular stay small. Nothing waits for the
    device, and no gradient flows through. A batch gives what its matrices give one by one, up to rounding, in as many
    launches as a single matrix.

    Args:
        x: ``(batch, rows, columns)`` or ``(rows, columns)``, in bfloat16, float16, float32 or float64; not changed.
            Only ratios within a matrix matter: each is first divided by its Frobenius norm.
        steps: Number of Newton–Schulz steps.
        coefficients: ``(a, b, c)`` for all steps, or one such triple for each step, as :func:`polar_express` gives.
        eps: Frobenius norms below this count as this.
        dtype: The type that matrices are multiplied in, also under autocast. None: bfloat16 on CUDA, float32
            elsewhere, and float64 for a float64 ``x``.
        products: What computes ``X Xᵀ`` and ``b A + c A A``: ``"torch"`` or ``"triton"``. ``"auto"``: Triton for
            half-precision products on CUDA, where it is installed and the matrices are large enough.

    Returns:
        A new, contiguous tensor with the shape and the dtype of ``x``.

    Raises:
        ValueError: ``x`` is no matrix or batch of matrices; ``x`` or ``dtype`` is of another type; ``steps`` is less
            than 1; not one triple per step; ``eps`` is not positive; ``products`` is none of the above, or
            ``"triton"`` where Triton cannot be used.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0]])
        >>> orthogonalize(x, steps=8, coefficients=polar_express(8)).round(decimals=4).abs()
        tensor([[0.6000, 0.0000, 0.8000],
                [0.0000, 1.0000, 0.0000]])

    References:
        Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
        https://kellerjordan.github.io/posts/muon/. The iteration: Björck and Bowie, An Iterative Algorithm for
        Computing the Best Estimate of an Orthogonal Matrix, SIAM J. Numer. Anal. 8(2), 1971.
    """
    if x.dim() not in (2, 3):
        raise ValueError(f"x has shape {tuple(x.shape)}; valid: (batch, rows, columns) or (rows, columns)")
    for name, kind in {"x": x.dtype, "dtype": dtype or x.dtype}.items():
        if kind not in _STORAGE:
            raise ValueError(f"{name} is {kind}; valid: {', '.join(map(str, _STORAGE))}")
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive: it is what the norm of a zero matrix counts as")
    schedule = _schedule(steps, coefficients)
    dtype = dtype or _default_dtype(x)
    # A tall matrix is multiplied from the right: the transpose's iteration, without the transpose's memory layout.
    tall = x.size(-2) > x.size(-1)
    X = _normalized(x if x.dim() == 3 else x.unsqueeze(0), eps, dtype)
    product = _symmetric_product(X.mT if tall else X, products)
    with no_autocast(x.device.type):  # a step inside of autocast should be the same step
        for a, b, c in schedule:
            A = product(X.mT if tall else X)
            B = product(A, A, alpha=c, beta=b)  # A is its own transpose
            X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X.view(x.shape).to(x.dtype)


class Orthogonalized(Transform):
    """Muon's transform: Newton–Schulz, with the update's scale as a factor of the last step's polynomial."""

    any_order = True
    workspace = 2  # bfloat16

    def shape(self, group: Group, p: Tensor) -> tuple[int, ...] | None:
        """See :meth:`Transform.shape`."""
        return matrices(p.shape, group["stacked"]) if p.numel() and p.ndim >= 2 else None

    def constants(self, group: Group, shape: tuple[int, ...]) -> tuple[Triple, ...]:
        """See :meth:`Transform.constants`: the polynomial of each step."""
        rows, columns = shape
        steps = int(group["ns_steps"])
        schedule = (MUON,) * steps if group["ns_coefficients"] == "muon" else polar_express(steps)
        size = max(1.0, rows / columns) ** 0.5 if group["adjust_lr"] == "original" else 0.2 * max(rows, columns) ** 0.5
        a, b, c = schedule[-1]
        return (*schedule[:-1], (size * a, size * b, size * c))

    def dtype(self, p: Tensor) -> torch.dtype:
        """See :meth:`Transform.dtype`: the type that :func:`orthogonalize` multiplies in."""
        if p.dtype == torch.float64:
            return torch.float64
        return torch.bfloat16 if p.is_cuda else torch.float32

    def forth(self, x: Tensor, stack: Stack) -> Tensor:
        """See :meth:`Transform.forth`."""
        return orthogonalize(x, steps=len(stack.constants), coefficients=stack.constants)


def matrices(shape: torch.Size, stacked: bool) -> tuple[int, int, int]:
    """How many matrices a weight of two or more dimensions is stepped as, and their numbers of rows and columns."""
    if len(shape) == 3 and stacked:
        return shape[0], shape[1], shape[2]
    return 1, shape[0], math.prod(shape[1:])


def _schedule(steps: int, coefficients: Triple | Sequence[Triple]) -> list[Triple]:
    """One triple per step."""
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    single = all(isinstance(value, int | float) for value in coefficients)
    triples: list[Any] = [coefficients] * steps if single else list(coefficients)
    for triple in triples:
        if not isinstance(triple, Sequence) or len(triple) != 3:
            raise ValueError(f"coefficients has {triple!r} for one step; valid: three numbers (a, b, c)")
    if len(triples) != steps:
        raise ValueError(f"coefficients has {len(triples)} triples for steps={steps}; valid: one, or one per step")
    return [(float(a), float(b), float(c)) for a, b, c in triples]


def _default_dtype(x: Tensor) -> torch.dtype:
    if x.dtype == torch.float64:
        return torch.float64  # as everywhere here: math in float64 where weights are
    return torch.bfloat16 if x.is_cuda else torch.float32


def _normalized(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Each matrix divided by its Frobenius norm, in one pass and with one rounding."""
    math = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
    # A norm of norms: over both dimensions at once, torch's CPU kernel is 7e-4 off at 16 Mi elements, this 3e-9.
    inner, outer = (-2, -1) if x.stride(-2) < x.stride(-1) else (-1, -2)
    norm = torch.linalg.vector_norm(x, dim=inner, keepdim=True, dtype=math)
    norm = torch.linalg.vector_norm(norm, dim=outer, keepdim=True).clamp_(min=eps)
    return torch.div(x, norm, out=torch.empty_like(x, dtype=dtype))


def _torch_product(x: Tensor, addend: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    if addend is None:
        return torch.bmm(x, x.mT)
    return torch.baddbmm(addend, x, x.mT, alpha=alpha, beta=beta)


def _symmetric_product(x: Tensor, products: Products) -> SymmetricProduct:
    """The function that multiplies: see ``products`` of :func:`orthogonalize`."""
    if products not in get_args(Products):
        raise ValueError(f"products={products!r} is unknown; valid: {', '.join(get_args(Products))}")
    if products == "triton":
        reason = _triton_refuses(x)
        if reason is not None:
            raise ValueError(f"products='triton' cannot be: {reason}")
    elif products == "torch" or not _triton_pays(x) or _triton_fails(x.device, x.dtype):
        return _torch_product
    from lightning_optim.engines.triton.symmetric import symmetric_product

    return symmetric_product


def _triton_pays(x: Tensor) -> bool:
    # In float32 the kernel may not use tensor cores (TF32 would not be float32), and cuBLAS does well without.
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    _, rows, columns = x.shape
    return rows >= TRITON_MIN_ROWS and rows % TRITON_MULTIPLE == 0 and columns % TRITON_MULTIPLE == 0


def _triton_refuses(x: Tensor) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    from lightning_optim.engines.triton.symmetric import INTERPRETED

    if x.dtype == torch.float64:
        return "its products are accumulated in float32, less than the float64 asked for"
    if not x.is_cuda and not INTERPRETED:
        return f"the tensor is on {x.device}, the kernel needs CUDA"
    return None


@cache
def _triton_fails(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel cannot run on a device: only a launch shows a missing compiler, or too small a GPU."""
    if find_spec("triton") is None:
        return True
    try:
        from lightning_optim.engines.triton.symmetric import symmetric_product

        symmetric_product(torch.zeros(1, TRITON_MULTIPLE, TRITON_MULTIPLE, device=device, dtype=dtype))
    except Exception as error:  # Triton's errors have no common class
        warn_once(
            f"lightning-optim: the Triton kernel for symmetric products cannot be used ({error}); multiplying with "
            "torch instead",
            key=f"symmetric products: {device} {dtype}",
        )
        return True
    return False
