"""SAM on a GPU: ``pytest -m gpu tests/sam``."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from lightning_optim.control.replay.window import Window
from lightning_optim.optimizers.sam import SAM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_perturbation_never_waits(adaptive: bool) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    params = [nn.Parameter(torch.randn(64, 32, device="cuda", dtype=dtype)) for dtype in dtypes]
    optimizer = SAM(params, partial(torch.optim.SGD, lr=0.1), rho=0.5, adaptive=adaptive)
    old, scale = [p.detach().clone() for p in params], torch.tensor([8.0], device="cuda")
    for p in params:
        p.grad = torch.randn_like(p)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.perturb(scale)
        optimizer.restore()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(p, before) for p, before in zip(params, old, strict=True))


def test_noise_on_the_device_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 1)).to("cuda")
    window = Window(model, torch.Tensor.mean)
    for _ in range(3):
        window.run(partial(model, torch.randn(8, 32, device="cuda")))
    after = torch.cuda.get_rng_state()
    assert torch.equal(window.replay(lambda loss: None), window.loss)
    assert torch.equal(torch.cuda.get_rng_state(), after)
