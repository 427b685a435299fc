"""Param groups that an optimizer has split in two: a new learning rate of one part is meant for the whole group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

#: Keys in each part: its learning rate when last seen, and the ratio of the second part's learning rate to the first's.
SEEN, RATIO = "split_lr", "split_ratio"

Group = dict[str, Any]


def tie(first: Group, second: Group) -> None:
    """Let the learning rates of two parts of a group move together, in their present ratio."""
    if isinstance(first["lr"], Tensor) or isinstance(second["lr"], Tensor):
        return  # it may be on a device, and reading it would wait
    ratio = second["lr"] / first["lr"] if first["lr"] else 1.0
    for part in (first, second):
        part |= {SEEN: part["lr"], RATIO: ratio}


def follow(groups: Sequence[Group]) -> None:
    """If only one part of a group got a new learning rate, apply it to the whole group.

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
