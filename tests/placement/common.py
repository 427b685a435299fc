"""What the tests of plans share: parameters that take no memory, and machines that do not exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_optim.placement.machine import Machine

GIB = 2**30


def weights(count: float, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """So many weights, in one matrix."""
    return [nn.Parameter(torch.empty(int(count) // 2, 2, dtype=dtype, device="meta"))]


def card(**changes: Any) -> Machine:
    """A machine with a card of 80 GiB and round numbers."""
    known: dict[str, Any] = {
        "device": "cuda",
        "name": "a card",
        "devices": 1,
        "device_free": 80 * GIB,
        "host_free": 256 * GIB,
        "link_to_host": 2e10,
        "link_to_device": 2.5e10,
        "host_bandwidth": 1e11,
        "device_bandwidth": 2e12,
    }
    return Machine(**{**known, **changes})
