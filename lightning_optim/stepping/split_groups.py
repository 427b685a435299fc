"""Param groups that an optimizer has split in two: whoever then moves the learning rate of one part means the group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

#: In each part: its learning rate when it was last looked at, and that of the second part for each 1 of the first.
SEEN, RATIO = "split_lr", "split_ratio"

Group = dict[str, Any]


def tie(first: Group, second: Group) -> None:
    """Have the learning rates of two parts of a group move together, from what they are now."""
    if isinstance(first["lr"], Tensor) or isinstance(second["lr"], Tensor):
        return  # in the device's memory perhaps, which nobody should wait for
    ratio = second["lr"] / first["lr"] if first["lr"] else 1.0
    for part in (first, second):
        part |= {SEEN: part["lr"], RATIO: ratio}


def follow(groups: Sequence[Group]) -> None:
    """Where one part of a group was given another learning rate and the other was not, take it for the whole group's.

    Finetuning callbacks write to ``param_groups[-1]``, the last group that they added, and know of no parts. Schedules
    move all groups, and are left alone.

    >>> first, second = {"lr": 0.02}, {"lr": 0.001}
    >>> tie(first, second)
    >>> second["lr"] = 0.04
    >>> follow([first, second])
    >>> first["lr"], second["lr"]
    (0.04, 0.002)
    """
    for first, second in pairwise(groups):
        # Neighbours of two groups that were split may have the same ratio.
        halves = first.get("use_muon", True) and not second.get("use_muon", False)
        if halves and SEEN in first and SEEN in second and first[RATIO] == second[RATIO]:
            lrs = [part["lr"] for part in (first, second)]
            if any(isinstance(lr, Tensor) for lr in lrs):
                continue
            moved = [lr != part[SEEN] for lr, part in zip(lrs, (first, second), strict=True)]
            if moved[0] != moved[1]:
                first["lr"] = lrs[0] if moved[0] else lrs[1]
                second["lr"] = first["lr"] * first[RATIO]
            first[SEEN], second[SEEN] = first["lr"], second["lr"]
