"""What the tests of the host engine share: a run, a new process, compilers, kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim.engines import ENGINES, cache
from lightning_optim.engines.host import toolchain as toolchains
from lightning_optim.engines.host.engine import HostEngine
from lightning_optim.optimizers import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS

NO_COMPILER = ENGINES["host"].unavailable()
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what was loaded, but not the cache folder."""
    monkeypatch.setitem(ENGINES, "host", HostEngine())
    monkeypatch.setattr("lightning_optim.warnings._seen", set())
    toolchains.find_toolchain.cache_clear()
    cache.private_folder.cache_clear()


def run(steps: int = 3, name: str = "adamw", **options: Any) -> tuple[list[Tensor], RuleOptimizer]:
    """Weights of two types (so, two buckets) after some steps, and their optimizer."""
    random = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 5, generator=random)) for _ in range(2)]
    params.append(nn.Parameter(torch.randn(7, generator=random).to(torch.bfloat16)))
    optimizer = OPTIMIZERS[name].create(params, lr=0.1, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=random).to(p.dtype)
        optimizer.step()
    return [p.detach() for p in params], optimizer


def assert_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))
