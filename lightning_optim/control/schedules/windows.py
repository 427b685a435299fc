"""How many batches make an optimizer step, by schedule over epochs or over optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_optim.checks import check_choice, check_number, check_switch, whole

#: What the windows of a schedule are counted by.
By = Literal["epoch", "step"]


@dataclass(frozen=True)
class Windows:
    """How many batches make a step, by epoch or by optimizer step.

    Args:
        lengths: The number of batches, by the epoch or step at which it begins to hold; there is one for 0.
        by: What the keys count: ``"epoch"`` or ``"step"``, both from 0.
        across_epochs: Whether a window that an epoch's end leaves open goes on in the next epoch.

    >>> ramp = Windows.checked("Accumulator", {1000: 2, 3000: 4}, "step")
    >>> [ramp.at(epoch=0, step=step) for step in (0, 999, 1000, 5000)]
    [1, 1, 2, 4]
    """

    lengths: Mapping[int, int]
    by: By = "epoch"
    across_epochs: bool = False

    @classmethod
    def checked(cls, who: str, windows: Any, by: Any = "epoch", across_epochs: Any = False) -> Windows:
        """The windows that a user's options describe.

        Args:
            who: Whose options they are, for errors.
            windows: The number of batches, or a dict as in :attr:`lengths`. Before its first key, a batch is a window.
            by: See the class.
            across_epochs: See the class.

        Raises:
            ValueError, WrongTypeError: An option is not valid.
        """
        check_choice(who, "by", by, ("epoch", "step"))
        check_switch(who, "across_epochs", across_epochs)
        if not isinstance(windows, Mapping):
            return cls({0: check_number(who, "windows", windows, whole(1))}, by, across_epochs)
        if not windows:
            raise ValueError(f"{who}: windows={{}}; valid: a whole number >= 1, or a dict such as {{0: 4, 10: 2}}")
        lengths = {
            check_number(who, f"{by} in windows", begin, whole(0)): check_number(
                who, f"windows[{begin!r}]", length, whole(1)
            )
            for begin, length in windows.items()
        }
        return cls({0: 1, **dict(sorted(lengths.items()))}, by, across_epochs)

    def at(self, epoch: int, step: int) -> int:
        """The number of batches in a window that begins in this epoch, after so many optimizer steps."""
        point = epoch if self.by == "epoch" else step
        return self.lengths[max(begin for begin in self.lengths if begin <= point)]

    def change_after(self, step: int) -> float:
        """The first optimizer step after this one at which another number of batches may hold; infinite: none."""
        later = [begin for begin in self.lengths if begin > step] if self.by == "step" else []
        return min(later, default=math.inf)

    @property
    def longest(self) -> int:
        """The largest number of batches in a window."""
        return max(self.lengths.values())
