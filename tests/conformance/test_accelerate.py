"""Hugging Face Accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from .common import (
    UNIQUE,
    Net,
    asking,
    assert_close,
    assert_same_state,
    by_gradient,
    by_hand,
    dataset,
    each_kind,
    known_warnings,
    maker,
)

pytestmark = known_warnings


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    from accelerate.state import AcceleratorState, GradientState  # type: ignore[import-untyped]

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@asking
@pytest.mark.usefixtures("_fresh_accelerate")
def test_nobody_answers_there(name: str) -> None:
    """What a step asks for beside gradients is missed at the first one."""
    from accelerate import Accelerator  # type: ignore[import-untyped]

    net = Net()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(net, maker(name)(net.parameters()))
    accelerator.backward(prepared(torch.ones(2, 6)).sum())
    with pytest.raises(RuntimeError, match=r"step\(\) without evaluate=.*valid: step\(evaluate=lambda"):
        optimizer.step()


@each_kind
@by_gradient
@pytest.mark.usefixtures("_fresh_accelerate")
def test_accelerate(name: str, tmp_path: Path) -> None:
    """``prepare``, ``accumulate``, clipping, a schedule, ``save_state`` and ``load_state`` into a fresh run."""
    from accelerate import Accelerator

    def prepared() -> tuple[Any, ...]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        net = Net(torch.float64)
        optimizer = maker(name, **UNIQUE.get(name, {}))(net.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        loader = DataLoader(dataset(dtype=torch.float64), batch_size=2)
        return accelerator, *accelerator.prepare(net, optimizer, loader, schedule)

    def epoch(accelerator: Any, net: Any, optimizer: Any, loader: Any, schedule: Any) -> None:
        for x, y in loader:
            with accelerator.accumulate(net):
                accelerator.backward(nn.functional.mse_loss(net(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 0.3)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    run = prepared()
    epoch(*run)
    run[0].save_state(str(tmp_path / "state"))
    expected, _ = by_hand(maker(name, **UNIQUE.get(name, {})), clip=0.3)
    assert_close(run[1].state_dict(), expected.state_dict())
    epoch(*run)
    resumed = prepared()
    resumed[0].load_state(str(tmp_path / "state"))
    epoch(*resumed)
    assert_close(resumed[1].state_dict(), run[1].state_dict(), rtol=0, atol=0)
    assert_same_state(resumed[2].state_dict(), run[2].state_dict())
