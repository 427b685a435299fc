"""Numbers that rules observe: kernels write them, and users read them when they want."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim.rules.policy import OBSERVED


class Observed:
    """For each parameter and each name, a number that a step writes. Nothing is read back from a device here."""

    def __init__(self) -> None:
        self._places: dict[str, dict[Tensor, Tensor]] = {}

    def place(self, name: str, p: Tensor) -> Tensor:
        """The tensor that a number is written to.

        Args:
            name: The tensor's name in the Program.
            p: The parameter.
        """
        places = self._places.setdefault(name.removeprefix(OBSERVED), {})
        if p not in places or places[p].device != p.device:
            places[p] = torch.zeros((), dtype=torch.float32, device=p.device)
        return places[p]

    @property
    def numbers(self) -> dict[str, dict[Tensor, Tensor]]:
        """The numbers of each parameter's last step, by name and parameter: 0-dim tensors on the parameter's device."""
        return {name: dict(places) for name, places in self._places.items()}
