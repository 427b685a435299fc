"""The choice of a transport by the kind of device."""

from __future__ import annotations

import torch

from lightning_optim.offload.cuda import CudaTransport
from lightning_optim.offload.transport import CopyTransport, Transport


def transport_for(device: torch.device) -> Transport:
    """The transport between host memory and a device.

    Raises:
        ValueError: There is none for this kind of device.
    """
    if device.type == "cpu":
        return CopyTransport()
    if device.type == "cuda":
        return CudaTransport(device)
    raise ValueError(f"weights on {device}: detached steps know no way to host memory from there; valid: cpu, cuda")
