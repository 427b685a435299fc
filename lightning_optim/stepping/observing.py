"""Numbers that rules observe: written by their own kernels, read by whoever looks."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim.rules.policy import OBSERVED


class Observed:
    """For each parameter and each name, a number that a step writes. Nothing is read back before somebody looks."""

    def __init__(self) -> None:
        self._places: dict[str, dict[Tensor, Tensor]] = {}

    def place(self, name: str, p: Tensor) -> Tensor:
        """Where a number goes.

        Args:
            name: Of the tensor, in the Program.
            p: The parameter.
        """
        places = self._places.setdefault(name.removeprefix(OBSERVED), {})
        if p not in places or places[p].device != p.device:
            places[p] = torch.zeros((), dtype=torch.float32, device=p.device)
        return places[p]

    @property
    def numbers(self) -> dict[str, dict[Tensor, Tensor]]:
        """By name and parameter, the numbers of the last step in which the parameter was: 0-dim, on its device."""
        return {name: dict(places) for name, places in self._places.items()}
