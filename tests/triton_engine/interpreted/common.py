"""What the tests in Triton's interpreter share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.engines import ENGINES
from lightning_optim.engines.triton import TritonEngine, engine
from lightning_optim.optimizers import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS, create_optimizer

#: Those whose rules Triton prints: without rows and columns.
PRINTED = [
    name
    for name, info in OPTIMIZERS.items()
    if not any(slot.rate in ("row", "column") for rule in info.cls.rules() for slot in rule.slots.values())
]

SHAPES: tuple[tuple[int, ...], ...] = ((3, 5), (7,), (), (0,), (33, 31), (1,), (2, 3, 2, 2))


def weights(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]
    return [nn.Parameter(w.to(memory_format=torch.channels_last) if w.ndim == 4 else w) for w in made]


def gradient(p: Tensor, step: int, index: int) -> Tensor:
    random = torch.Generator().manual_seed(1000 * step + index)
    g = torch.randn(p.shape, generator=random, dtype=torch.float64)
    return g.to(p.dtype).t().contiguous().t() if p.ndim == 2 and step % 2 else g.to(p.dtype)


def give_gradients(params: Sequence[Tensor], step: int) -> None:
    for index, p in enumerate(params):
        p.grad = gradient(p, step, index)


def make(name: str, params: Sequence[Any], **options: Any) -> RuleOptimizer:
    optimizer = create_optimizer(name, params, **{"engine": "triton", "lr": 0.02, **options})
    assert isinstance(optimizer, RuleOptimizer)
    return optimizer


def group_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(p is q for q in group["params"]))


def triton_engine() -> TritonEngine:
    found = ENGINES["triton"]
    assert isinstance(found, TritonEngine)
    return found


class Launches:
    """Notes every launch of a kernel, and lets it happen or not.

    Attributes:
        names: The kernels' names.
        keys: For each launch, all that Triton compiles anew for: the kernel, its constants, the types and alignment
            of its pointers, and the integers that are not exempt.
    """

    def __init__(self, monkeypatch: Any, *, run: bool = True) -> None:
        self.names: list[str] = []
        self.keys: list[tuple[Any, ...]] = []
        built = TritonEngine._built

        def noting(owner: TritonEngine, *args: Any) -> Any:
            kernels = built(owner, *args)
            wrapped = {
                name: tuple(_Noted(kernel, self, run) for kernel in getattr(kernels, name))
                for name in ("scalars", "sweeps")
            }
            return type(kernels)(**{**vars(kernels), **wrapped})

        monkeypatch.setattr(TritonEngine, "_built", noting)


class _Noted:
    def __init__(self, kernel: Any, log: Launches, run: bool) -> None:
        self.kernel, self.log, self.runs = kernel, log, run

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.log.names.append(self.kernel.fn.__name__)
            key: list[Any] = [self.kernel.fn.__name__, *sorted(options.items())]
            for name, arg in zip(self.kernel.arg_names, args, strict=False):
                if isinstance(arg, Tensor):
                    key.append((name, arg.dtype, arg.data_ptr() % 16 == 0))
                else:
                    assert name in EXEMPT, f"{name} is an integer that Triton specializes on"
            self.log.keys.append(tuple(key))
            if self.runs:
                self.kernel[grid](*args, **options)

        return launch


EXEMPT = ("n", "stride", "parts")
assert engine.CHUNK % engine.BLOCK == 0
