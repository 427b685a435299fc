"""Estimates of the Hessian's diagonal from products of the Hessian with random directions.

Nothing here knows an optimizer: it takes a loss, parameters, and a function that evaluates products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_optim.rules.rounding import noise_key
from lightning_optim.stepping.shards import is_distributed

#: The seed of the directions' generators. It is the same in all processes: replicas must take the same direction.
SEED = 0.0
#: Makes these random numbers differ from those of stochastic rounding.
_SALT = 0x48757463

Products = Callable[[Mapping[Tensor, Tensor]], Mapping[Tensor, Tensor]]


def hessian_vector(loss: Tensor, directions: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """The products of a loss's Hessian with a direction that has one part for each parameter.

    Gradients stay as they are, and hooks on their accumulation (DDP's, say) are not called; hooks of tensors and of
    modules are. The real and the imaginary part of a complex parameter are two variables.

    Args:
        loss: One number, with its graph, which is used up.
        directions: For each parameter, a tensor of its shape and type.

    Raises:
        RuntimeError: The loss cannot be differentiated twice; the message says what can be done.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> loss = weight.prod() ** 2 / 2
    >>> hessian_vector(loss, {weight: torch.tensor([1.0, 0.0])})[weight]  # its first column
    tensor([4., 4.])
    """
    params = [p for p in directions if p.requires_grad]
    if any(map(is_distributed, params)):
        raise RuntimeError(
            "a second derivative of sharded parameters (FSDP2, DTensor): their gathering and scattering is "
            "differentiated once only; valid: parameters that each process has as a whole, as under DDP"
        )
    try:
        with torch.enable_grad():
            slopes = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        pairs = [(g, directions[p]) for p, g in zip(params, slopes, strict=True) if g is not None and g.requires_grad]
        parts, along = zip(*pairs, strict=True) if pairs else ((), ())
        products = torch.autograd.grad(parts, params, along, allow_unused=True) if pairs else ()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"the loss could not be differentiated twice ({error}); valid: operations that have second derivatives, in "
            "a model that is not compiled (torch.compile has none, but for backend='eager'), with attention under "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) and checkpoint(use_reentrant=False), and a loss that "
            "backward() was not called of"
        ) from error
    found = {p: product for p, product in zip(params, products, strict=False) if product is not None}
    return {p: found[p] if p in found else torch.zeros_like(u) for p, u in directions.items()}


def hutchinson(directions: Mapping[Tensor, Tensor], products: Products) -> dict[Tensor, Tensor]:
    r"""Hutchinson's estimate of the Hessian's diagonal: :math:`u \odot H u` with :math:`u \sim N(0, I)`.

    Its expectation is the diagonal.

    Args:
        directions: For each parameter, a direction from :func:`normal_direction`; they are overwritten.
        products: Returns the products of the Hessian with a direction, by parameter.

    References:
        Liu et al., Sophia, arXiv:2305.14342, algorithm 1.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> loss = (weight**4).sum() / 12  # whose Hessian is diagonal: 1, 4
    >>> u = normal_direction(weight, 0, 1)
    >>> expected = u.square() * torch.tensor([1.0, 4.0])
    >>> torch.allclose(hutchinson({weight: u}, lambda u: hessian_vector(loss, u))[weight], expected)
    True
    """
    found = products(directions)
    with torch.no_grad():  # in the directions' memory, which is laid out as the parameters' is
        return {p: _multiply(u, found[p]) for p, u in directions.items()}


@torch.no_grad()
def normal_direction(p: Tensor, number: int, step: int) -> Tensor:
    """Independent normal numbers for each element of a parameter (two, if it is complex).

    They depend on ``number`` and ``step`` alone, and so are the same in all processes and in a resumed run. No shared
    random generator is read or advanced.

    Args:
        p: The parameter, whose shape, type and device they have.
        number: The parameter's number in its optimizer.
        step: The number of the optimizer's step.
    """
    generator = torch.Generator(p.device)
    generator.manual_seed(int(noise_key(SEED, number, step, _SALT)))
    u = torch.empty_like(p, requires_grad=False)
    (torch.view_as_real(u) if u.is_complex() else u).normal_(generator=generator)
    return u


def _multiply(u: Tensor, product: Tensor) -> Tensor:
    if u.is_complex():
        torch.view_as_real(u).mul_(torch.view_as_real(product.resolve_conj()))
        return u
    return u.mul_(product)
