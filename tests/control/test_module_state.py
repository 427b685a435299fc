"""Buffers that share memory, with each other or with weights, are put back as they were."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_optim.control.replay.module_state import ModuleState
from lightning_optim.control.replay.window import Window


class Counting(nn.Module):
    """Adds to its buffer when it is called."""

    def __init__(self, total: Tensor) -> None:
        super().__init__()
        self.total: Tensor
        self.register_buffer("total", total)

    def forward(self) -> Tensor:
        self.total += 1
        return self.total.clone()


def test_buffers_tied_through_data() -> None:
    """A write by one of them raises no version of the other."""
    memory = torch.zeros(3)
    pair = nn.ModuleList([Counting(memory), Counting(memory.data)])
    states = [ModuleState(pair)]
    for one in pair:
        one()
        states.append(ModuleState(pair, states[-1]))
    for value in (2.0, 1.0, 0.0, 1.0, 2.0):
        states[int(value)].put_back()
        assert memory.tolist() == [value] * 3


def test_a_buffer_that_is_a_weight_is_not_put_back() -> None:
    """By a view of its memory a perturbation would be undone in the midst of the second pass."""
    layer = nn.Linear(2, 1, bias=False)
    layer.register_buffer("seen", layer.weight.detach())
    layer.register_buffer("own", torch.zeros(1))
    window = Window(layer, lambda loss: loss)
    batch = torch.ones(1, 2)
    first = window.run(lambda: layer(batch).sum()).item()
    with torch.no_grad():
        layer.weight.add_(1.0)
        assert window.replay(lambda loss: None).item() - first > 1.9
    assert torch.equal(layer.get_buffer("seen"), layer.weight)


def test_a_buffer_beside_a_weight_is() -> None:
    """In one storage, as where all of a module's tensors were made one."""
    flat = torch.zeros(6)
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = flat[:2].view(1, 2)
    layer.register_buffer("total", flat[2:])
    state = ModuleState(layer)
    layer.get_buffer("total").add_(1)
    state.put_back()
    assert layer.get_buffer("total").tolist() == [0.0] * 4
