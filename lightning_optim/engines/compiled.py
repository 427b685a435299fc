"""The base class of engines with compiled kernels: tensors are found by address, and a kernel is built once."""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, TypeVar

import torch

from lightning_optim.engines.base import Bucket, Engine, Layout
from lightning_optim.engines.cache import BuildError
from lightning_optim.rules.ops import norm
from lightning_optim.rules.program import Program
from lightning_optim.rules.trace import trace

Kernel = TypeVar("Kernel")


class CompiledEngine(Engine, Generic[Kernel]):
    """An engine whose kernels are printed from Programs, and read tensors at their addresses."""

    uses_addresses = True

    def __init__(self) -> None:
        self._kernels: dict[tuple[str, Layout], Kernel | BuildError] = {}

    @abstractmethod
    def build(self, program: Program, layout: Layout) -> Kernel:
        """Build the kernel of a Program.

        Raises:
            BuildError: The kernel cannot be built.
        """

    def _built(self, program: Program, layout: Layout) -> Kernel:
        """The kernel of a Program; a build that failed is not tried again in this process."""
        key = (program.fingerprint, layout)
        if key not in self._kernels:
            try:
                self._kernels[key] = self.build(program, layout)
            except BuildError as error:
                self._kernels[key] = error
        kernel = self._kernels[key]
        if isinstance(kernel, BuildError):
            raise kernel
        return kernel

    def _built_norm(self, bucket: Bucket) -> Kernel:
        """The kernel of :data:`NORM` for a bucket's gradients."""
        dtype = dict(bucket.layout.dtypes)["g"]
        math = torch.float64 if dtype == torch.float64 else torch.float32
        return self._built(NORM, Layout(math, (("g", dtype),)))


def _norm(g: object) -> dict[str, object]:
    # Not the sum of g * g, which float32 may not hold: the squares of a norm are summed in float64.
    return {"return": [norm(g)]}


#: The norm of each gradient. Its one pass adds up squares.
NORM = trace(_norm, tensors=("g",), scalars=())
