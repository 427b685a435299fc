"""Slots: the named pieces of state that a rule keeps from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

#: How many numbers a slot has: one for each element, row or column of its weight, one for the whole weight, or one that
#: all weights of the optimizer share.
SlotRate = Literal["element", "row", "column", "scalar", "shared"]
SLOT_RATES: tuple[SlotRate, ...] = ("element", "row", "column", "scalar", "shared")
#: The sides of a matrix, by which the shape of a slot may be declared.
SIDES = ("rows", "columns")


@dataclass(frozen=True)
class Slot:
    """The declaration of one slot of a rule.

    Args:
        init: Its value before the first step: a number; ``"p"``, a copy of the weight; or the name of an option.
        rate: How many numbers it has.
        when: It exists only where the flag of this name is set.
        unless: It exists only where the flag of this name is not set.
        shape: Only in a matrix rule: the slot's shape, as a tuple of ``"rows"``, ``"columns"`` and indices of the
            weight's dimensions; None: the shape that the rate implies.

    Raises:
        ValueError: An unknown rate or side, or an ``init`` that a slot of this rate cannot have.

    >>> Slot(rate="row").shape_for(torch.Size([3, 4, 5])), Slot(rate="column").shape_for(torch.Size([3, 4, 5]))
    (torch.Size([3, 4, 1]), torch.Size([3, 1, 5]))
    >>> Slot(shape=("rows", "rows")).shape_for(torch.Size([4, 5]))
    torch.Size([4, 4])
    """

    init: float | str = 0.0
    rate: SlotRate = "element"
    when: str | None = None
    unless: str | None = None
    shape: tuple[str | int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the words."""
        if self.rate not in SLOT_RATES:
            raise ValueError(f"rate={self.rate!r}; valid: {', '.join(SLOT_RATES)}")
        words = {side for side in self.shape or () if not isinstance(side, int)}
        if self.shape is not None and (self.rate != "element" or not words <= set(SIDES)):
            raise ValueError(f"shape={self.shape!r} of rate {self.rate}; valid: of rate element, {', '.join(SIDES)}")
        if self.init == "p" and (self.rate != "element" or self.shape is not None):
            raise ValueError(f"init='p' of a slot with rate {self.rate} and shape {self.shape}; valid: a number")

    @property
    def is_plain(self) -> bool:
        """Whether the slot has one number for each element of its weight."""
        return self.rate == "element" and self.shape is None

    @property
    def is_scalar(self) -> bool:
        """Whether the slot is a single number."""
        return self.rate in ("scalar", "shared")

    def exists(self, flags: Mapping[str, bool]) -> bool:
        """Whether a weight has the slot under these flags."""
        return (self.when is None or flags[self.when]) and (self.unless is None or not flags[self.unless])

    @property
    def is_optional(self) -> bool:
        """Whether the slot's existence depends on a flag."""
        return self.when is not None or self.unless is not None

    def shape_for(self, weight: torch.Size) -> torch.Size:
        """The slot's shape for a weight of this shape.

        Raises:
            ValueError: The slot has rows or columns, but the weight has fewer than two dimensions.
        """
        if self.is_plain:
            return weight
        if self.is_scalar:
            return torch.Size(())
        if self.shape is not None and all(isinstance(side, int) and side < len(weight) for side in self.shape):
            return torch.Size([weight[int(side)] for side in self.shape])
        if len(weight) < 2:
            raise ValueError(f"a weight of shape {tuple(weight)} has no rows and columns")
        *batch, rows, columns = weight
        if self.shape is not None:
            sizes: dict[str | int, int] = {"rows": rows, "columns": columns}
            return torch.Size([*batch, *(sizes[side] for side in self.shape)])
        return torch.Size([*batch, rows, 1] if self.rate == "row" else [*batch, 1, columns])
