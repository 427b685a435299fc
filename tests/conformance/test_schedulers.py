"""torch's schedulers."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor

from .common import Net, assert_close, each, each_kind, known_warnings, maker

pytestmark = known_warnings


def loss_of(net: Net, x: Tensor) -> Tensor:
    return net(x).sum()


@each_kind
@each
@pytest.mark.parametrize("kind", ["LambdaLR", "OneCycleLR"])
def test_torch_schedulers(name: str, kind: str) -> None:
    """They warn of nothing, and what they set is what the step uses: lr, and one-cycle's momentum or betas."""
    nets = [Net(torch.float64) for _ in range(2)]
    scheduled, manual = (maker(name)(net.parameters()) for net in nets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule: torch.optim.lr_scheduler.LRScheduler
        if kind == "LambdaLR":
            schedule = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 0.9**step)
        else:
            cycles = bool({"betas", "momentum"} & scheduled.param_groups[0].keys())  # torch's Adafactor has neither
            schedule = torch.optim.lr_scheduler.OneCycleLR(scheduled, 0.1, total_steps=8, cycle_momentum=cycles)
        used = []
        for step in range(6):
            for group, other in zip(scheduled.param_groups, manual.param_groups, strict=True):
                other.update({k: v for k, v in group.items() if k in ("lr", "betas", "momentum")})
            used.append({k: v for k, v in scheduled.param_groups[0].items() if k in ("lr", "betas", "momentum")})
            for net, optimizer in zip(nets, (scheduled, manual), strict=True):
                optimizer.zero_grad()
                loss = partial(loss_of, net, torch.full((2, 6), 0.1 * step, dtype=torch.float64))
                loss().backward()
                optimizer.step(evaluate=loss)
            schedule.step()
    assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=0)
    assert len({options["lr"] for options in used}) == 6
    moving = [key for key in ("betas", "momentum") if key in used[0]]
    assert moving or name == "adafactor"
    for option in moving[:1]:
        assert (len({options[option] for options in used}) > 3) == (kind == "OneCycleLR")
