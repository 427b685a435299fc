"""What the tests with DeepSpeed share: a model, its data, and the run in one process without any of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim

#: float32 in another order: gradients are summed over processes and micro-batches, and multiplied by a clip factor,
#: in other places than in the run to compare with, and updates are up to 0.05 at a time.
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": partial(lightning_optim.AdamW, lr=0.05, weight_decay=0.1),
    "Lion": partial(lightning_optim.Lion, lr=0.01, weight_decay=0.1),
    "LAMB": partial(lightning_optim.LAMB, lr=0.01, weight_decay=0.1),
}
NAMES = ["AdamW", "Lion"]


def missing(*packages: str) -> str | None:
    """Why a test with DeepSpeed cannot run here, if so."""
    from importlib.util import find_spec

    absent = [package for package in ("deepspeed", *packages) if find_spec(package) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def needs(*packages: str) -> pytest.MarkDecorator:
    reason = missing(*packages)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 1))
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = (torch.randn(p.shape, generator=generator) * 0.5).to(dtype)
    return net


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """Two groups, which ZeRO steps one after the other: no decay for what is not a matrix."""
    return lightning_optim.param_groups(net, weight_decay=0.1)


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator)
    return x, 3 * x.sin().sum(dim=1, keepdim=True)


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(net(x.to(next(net.parameters()).dtype)).float(), y)


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def schedule_of(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def unsharded(
    name: str, *, batch: int, clip: float | None = None, accumulate: int = 1, dtype: torch.dtype = torch.float32
) -> list[dict[str, Tensor]]:
    """The weights after every step of one process without DeepSpeed.

    Weights in bfloat16 are the rounded copies of float32 masters, which are what the optimizer steps.
    """
    net = network(dtype)
    masters = network()
    masters.load_state_dict(net.state_dict())
    optimizer = OPTIMIZERS[name](groups(masters))
    schedule = schedule_of(optimizer)
    x, y = samples()
    found = []
    for number, (some, labels) in enumerate(zip(x.split(batch), y.split(batch), strict=True)):
        (loss_of(net, some, labels) / accumulate).backward()
        if (number + 1) % accumulate:
            continue
        for p, master in zip(net.parameters(), masters.parameters(), strict=True):
            master.grad, p.grad = p.grad.float(), None  # type: ignore[union-attr]
        if clip is not None:
            nn.utils.clip_grad_norm_(masters.parameters(), clip)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for p, master in zip(net.parameters(), masters.parameters(), strict=True):
                p.copy_(master)
        found.append(snapshot(net))
    return found


def assert_same_steps(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], **tolerance: Any) -> None:
    """The weights after every step."""
    assert len(found) == len(expected) > 1
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for name, value in ours.items():
            message = f"step {step}, {name}: {value} instead of {theirs[name]}"
            torch.testing.assert_close(value, theirs[name], **tolerance or CLOSE, msg=message)


def environment(rank: int, ranks: int) -> dict[str, str]:
    """As of a launcher."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": 0}
    cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    return {name: str(value) for name, value in place.items()} | cpu | {"ACCELERATE_USE_DEEPSPEED": "true"}


def join(rank: int, ranks: int, folder: Path) -> None:
    """Make this process one of a group; without a network port, which another run may have taken."""
    import warnings

    os.environ.update(environment(rank, ranks))
    os.environ.pop("LIGHTNING_OPTIM_ENGINE", None)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
