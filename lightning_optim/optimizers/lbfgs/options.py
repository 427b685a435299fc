"""The options of L-BFGS that hold for all param groups, and the check that the host has the memory for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_optim.checks import FRACTION, NONNEGATIVE, check_choice, check_number, check_ranges, check_switch, whole
from lightning_optim.optimizers.lbfgs.iterate import Signature, count, is_wide
from lightning_optim.optimizers.lbfgs.line_search import LINE_SEARCHES, LineSearch
from lightning_optim.optimizers.lbfgs.memory_budget import memory_limit, show_bytes

#: The most evaluations of a line search, as in ``torch.optim.LBFGS``: after 25 halvings a search is hopeless.
EVALUATIONS = 25

_NAME = "LBFGS"
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
#: Vectors besides the history: the weights, the direction, the step and two gradients; and in the history's type, two
#: right-hand sides and one result.
_VECTORS, _OF_HISTORY = 5, 3

_RANGES = {
    "history_size": whole(1),
    "max_iter": whole(1),
    "max_eval": whole(2).or_none(),
    "min_curvature": FRACTION.described("a cosine in [0, 1)").or_none(),
    "tolerance_grad": NONNEGATIVE,
    "tolerance_change": NONNEGATIVE,
}
_NOISE = FRACTION.described("a relative error in [0, 1), 'auto'")


@dataclass(frozen=True)
class LBFGSOptions:
    """The options that are described in :class:`~lightning_optim.optimizers.lbfgs.optimizer.LBFGSOptim`.

    Raises:
        ValueError: An option out of its range.
        TypeError: An option of the wrong type.
    """

    history_size: int
    line_search: LineSearch | None
    max_iter: int
    max_eval: int | None
    tolerance_grad: float
    tolerance_change: float
    noise: float | str
    history_dtype: str | torch.dtype | None
    min_curvature: float | None
    reuse_evaluation: bool
    memory_budget: int | float | None

    def __post_init__(self) -> None:
        check_ranges(_NAME, self, _RANGES)
        check_choice(_NAME, "line_search", self.line_search, (*LINE_SEARCHES, None))
        if self.noise != "auto":
            check_number(_NAME, "noise", self.noise, _NOISE)
        check_switch(_NAME, "reuse_evaluation", self.reuse_evaluation)
        if str(self.history_dtype).removeprefix("torch.") not in ("None", *_DTYPES):
            raise ValueError(f"{_NAME}: history_dtype={self.history_dtype!r}; valid: None, {', '.join(_DTYPES)}")
        memory_limit(self.memory_budget)

    def dtypes(self, layout: Signature) -> tuple[torch.dtype, torch.dtype]:
        """The type of the history, and that of the weights' master copy and all other vectors."""
        wide = is_wide(layout)
        named = str(self.history_dtype).removeprefix("torch.")
        history = _DTYPES.get(named, torch.float64 if wide else torch.float32)
        return history, torch.float64 if wide else history


def check_memory(name: str, layout: Signature, options: LBFGSOptions) -> None:
    """Check that the host has the memory, before any is taken.

    Raises:
        ValueError: The host has not; the message has the arithmetic, and what would fit.
    """
    elements = count(layout)
    history, other = (dtype.itemsize for dtype in options.dtypes(layout))
    pairs = 2 * elements * history * options.history_size
    rest = elements * (_VECTORS * other + _OF_HISTORY * history)
    limit, why = memory_limit(options.memory_budget)
    if pairs + rest <= limit:
        return
    fitting = [
        f"history_size<={most} with history_dtype='{dtype}'"
        for dtype, size in (("float32", 4), ("float64", 8))
        if size <= history and (most := _most(elements, size, max(size, other if size == history else 4), limit)) >= 1
    ]
    valid = "; valid: " + " or ".join(fitting) if fitting else "; no history fits: train fewer weights"
    raise ValueError(
        f"{name}: history_size={options.history_size} x 2 x {elements:.3g} weights x {history} B = "
        f"{show_bytes(pairs)}, and {show_bytes(rest)} for {_VECTORS + _OF_HISTORY} vectors, but {why}{valid}"
    )


def _most(elements: int, history: int, other: int, limit: float) -> int:
    """The largest number of pairs that fit."""
    return int((limit / max(1, elements) - _VECTORS * other - _OF_HISTORY * history) // (2 * history))
