"""An optimizer whose step is two buckets, to be cut short between them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lightning_optim


class Run:
    """Two kinds of weights, so that there are two buckets, and their optimizer."""

    def __init__(self, name: str, engine: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(3, 2), (3,)]]
        self.params.append(nn.Parameter(torch.randn(2, generator=generator, dtype=torch.float64)))
        if name == "adopted":
            self.optimizer: Any = torch.optim.Adam(self.params, lr=0.1)
            self.adopted = lightning_optim.adopt(self.optimizer, engine=engine)
            self.do: Callable[[], None] = self.adopted.step
            return
        if name == "sgd":  # whose first step is another than the later ones
            self.optimizer = lightning_optim.SGD(self.params, lr=0.1, momentum=0.9, dampening=0.5, engine=engine)
        elif name == "adamw":
            self.optimizer = lightning_optim.AdamW(self.params, lr=0.1, max_grad_norm=0.5, engine=engine)
        else:
            groups = [{"params": [p], "use_muon": p.ndim == 2} for p in self.params]
            self.optimizer = lightning_optim.Muon(groups, lr=0.1, engine=engine)
        self.do = self.optimizer.step

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        self.do()

    def contents(self) -> Any:
        return [p.detach().clone() for p in self.params], copy.deepcopy(self.optimizer.state_dict()["state"])
